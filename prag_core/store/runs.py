"""Runs: their ids, their inputs, and the lease that keeps two of them from working on one store.

The lease is `runs/lease.json`. It is taken, renewed and released by conditional writes, so that of two runs exactly
one gets it. The holder renews it with a heartbeat. When no heartbeat came for `ttl_s`, the next run takes the lease
over. The lease only saves work, it does not protect data: objects are immutable and commits come last, so a run that
lost its lease wastes work but corrupts nothing.

Clocks: a heartbeat holds the time of the holder's clock, and another machine compares it with its own. So a lease
counts as expired only `skew_s` after the time it gives; clocks that differ by less do no harm. If they differ by
more, a live lease can be taken over, which its holder notices at its next heartbeat, or a dead one is waited for
longer.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import posixpath
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from prag_core.data.parsing import parse_json
from prag_core.errors import ConflictError, DamagedError, LeaseError, StoreError
from prag_core.identity import seal
from prag_core.records import from_dict, from_document
from prag_core.store.objects import Store

LEASE = "runs/lease.json"
TTL_S = 120.0
SKEW_S = 30.0
BEATS_PER_TTL = 4
# The last second of the year 9999, after which there is no date.
_LAST_S = 253_402_300_799.0


def new_run_id(verb: str = "") -> str:
    """Return an id for a run that begins now. `verb` names a command other than a run, such as "gc"."""
    return f"{verb}{'-' if verb else ''}{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """The content of `runs/lease.json`. Times are in seconds since the epoch, by the holder's clock.

    `token` is random, so that no two records are equal. `machine` names the boot and the process namespace in which
    `pid` counts. `started` is when the process began, in clock ticks since boot, to tell it from a later process with
    the same pid. Both are empty if the system does not say.
    """

    token: str
    run: str
    host: str
    pid: int
    machine: str
    since: float
    heartbeat: float
    ttl_s: float
    released: bool = False
    started: str = ""

    @property
    def expires(self) -> float:
        """When the lease expires, unless another heartbeat comes."""
        return self.heartbeat + self.ttl_s


class RunLease:
    """A lease that this process holds. A thread renews it until `release`. Made by `acquire_lease`.

    It is released when the interpreter exits, too.
    """

    def __init__(self, store: Store, record: LeaseRecord) -> None:
        self._store = store
        self._record = record
        self._confirmed = time.monotonic()
        self._taken = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    @property
    def record(self) -> LeaseRecord:
        """The record that this lease last wrote to the store."""
        return self._record

    @property
    def lost(self) -> bool:
        """Whether another run has taken it over, or may have, because no heartbeat could be written for `ttl_s`."""
        return bool(self._taken) or time.monotonic() - self._confirmed > self._record.ttl_s

    def check(self) -> None:
        """Raise if the lease is lost, so that work under it stops.

        Raises:
            LeaseError: if it is lost.
        """
        if self._taken:
            raise LeaseError(
                f"store = {self._store.url!r}: the lease of run {self._record.run} was {self._taken}",
                "let that run continue; what this one has committed stays, and running again resumes",
            )
        if self.lost:
            raise LeaseError(
                f"store = {self._store.url!r}: the lease of run {self._record.run} could not be renewed for "
                f"{time.monotonic() - self._confirmed:.0f} s, so another run may have it now",
                "check the store, and run again; what was committed stays",
            )

    def release(self) -> None:
        """Stop the heartbeat and give the lease back, unless it is lost or the store cannot be written."""
        atexit.unregister(self.release)
        self._ended.set()
        self._thread.join(self._record.ttl_s)
        if not self._thread.is_alive():
            with contextlib.suppress(StoreError):  # it will expire
                self._renew(released=True)

    def _beat(self) -> None:
        while not self._ended.wait(self._record.ttl_s / BEATS_PER_TTL):
            with contextlib.suppress(StoreError):  # if the store stays unreachable, `lost` becomes true
                self._renew()
            if self._taken:
                return

    def _renew(self, released: bool = False) -> None:
        begun = time.monotonic()
        renewed = replace(self._record, heartbeat=time.time(), released=released)
        try:
            self._store.swap(LEASE, _encode(self._record), _encode(renewed))
        except ConflictError:
            data, found = _read(self._store)
            if found is None or found.token != self._record.token:
                self._taken = "removed" if found is None else f"taken over by {_describe(found)}"
                return
            self._store.swap(LEASE, data, _encode(renewed))  # our own heartbeat, whose answer was lost
        self._record = renewed
        self._confirmed = begun


def acquire_lease(
    store: Store, run: str, *, ttl_s: float = TTL_S, skew_s: float = SKEW_S, take_over: bool = False
) -> RunLease:
    """Take the store's lease for a run.

    The lease is free if nobody took it, it was released, it has expired, or its process ran on this machine and is
    gone.

    Args:
        store: The store.
        run: The run's id, which error messages show to other runs.
        ttl_s: How long the lease lasts after its last heartbeat.
        skew_s: How far the clocks of two machines may differ.
        take_over: Take the lease even if another run holds it or its record is damaged. Only for a run that is known
            to be dead.

    Raises:
        LeaseError: if another run holds it. The message says which, where, since when, until when, and how to take
            it over.
        StoreError: if the store cannot be read or written, or has no conditional write.
    """
    now = time.time()
    mine = LeaseRecord(
        token=uuid.uuid4().hex,
        run=run,
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        since=now,
        heartbeat=now,
        ttl_s=ttl_s,
        started=_process(os.getpid())[1],
    )
    try:
        before, held = _read(store)
    except StoreError:
        if not take_over:
            raise
        before, held = store.get_if_exists(LEASE), None
    if held is not None and not (take_over or is_over(held, skew_s=skew_s)):
        raise _held(store, held, skew_s)
    try:
        store.swap(LEASE, before, _encode(mine))
    except ConflictError:
        winner = _read(store)[1]
        if winner is None:
            raise
        raise _held(store, winner, skew_s) from None
    return RunLease(store, mine)


@contextlib.contextmanager
def hold_lease(
    store: Store, run: str, *, ttl_s: float = TTL_S, skew_s: float = SKEW_S, take_over: bool = False
) -> Iterator[RunLease]:
    """Hold the store's lease while a block runs; see `acquire_lease` for the arguments.

    Raises:
        LeaseError: if another run holds it, or at the end of the block if it was lost meanwhile.
        StoreError: as `acquire_lease` does.
    """
    lease = acquire_lease(store, run, ttl_s=ttl_s, skew_s=skew_s, take_over=take_over)
    try:
        yield lease
        lease.check()
    finally:
        lease.release()


def check_holder(store: Store, run: str) -> None:
    """Raise if the store's lease belongs to another run. A run's actors call this before they commit.

    An actor may outlive its killed driver for a while. Once another run has taken the lease, it stores nothing more.

    Raises:
        LeaseError: if another run has the lease.
        StoreError: if the lease cannot be read.
    """
    record = read_lease(store)
    if record is not None and record.run != run:
        raise LeaseError(
            f"store = {store.url!r}: the lease of run {run} was taken over by {_describe(record)}",
            "let that run continue; what this one has committed stays, and running again resumes",
        )


def wait_for_lease(
    store: Store, wait_s: float, *, skew_s: float = SKEW_S, look_every_s: float = 2.0
) -> LeaseRecord | None:
    """Wait up to `wait_s` until no run holds the store's lease; return the record of the run that still does, or None.

    This helps a job that is started again on another machine: it finds the lease of the lost one, which expires.
    """
    deadline = time.monotonic() + wait_s
    while True:
        held = _read(store)[1]
        if held is None or is_over(held, skew_s=skew_s):
            return None
        left = deadline - time.monotonic()
        if left <= 0:
            return held
        time.sleep(min(look_every_s, left))


def read_lease(store: Store) -> LeaseRecord | None:
    """Return the record of the store's lease, or None if no run ever took it."""
    return _read(store)[1]


def _read(store: Store) -> tuple[bytes | None, LeaseRecord | None]:
    data = store.get_if_exists(LEASE)
    if data is None:
        return None, None
    try:
        return data, from_document(LeaseRecord, parse_json(data.decode()))
    except (ValueError, TypeError) as error:
        raise DamagedError(
            f"{store.url}/{LEASE}: not a lease: {error}", "if no run is at work, run again with --take-over"
        ) from None


def _encode(record: LeaseRecord) -> bytes:
    return json.dumps(asdict(record), sort_keys=True).encode()


def is_over(record: LeaseRecord, *, skew_s: float = SKEW_S) -> bool:
    """Return whether nobody holds a lease any more.

    It was released, it has expired, or its process ran on this machine and is gone.
    """
    return record.released or time.time() > record.expires + skew_s or _is_dead(record)


def _is_dead(record: LeaseRecord) -> bool:
    """Return whether the holder ran in this process namespace, and its process is gone."""
    if not record.machine or record.machine != _machine():
        return False
    try:
        os.kill(record.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    state, started = _process(record.pid)
    # A killed process keeps its pid, as a zombie, until its parent asks for its exit code. Then the pid may be reused.
    return state in ("Z", "X") or bool(record.started and started and record.started != started)


def _process(pid: int) -> tuple[str, str]:
    """Return a process's state (a letter) and when it began (clock ticks since boot), or two empty strings."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _machine() -> str:
    """Return a name for this boot of this machine and this process namespace (each container has its own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _held(store: Store, record: LeaseRecord, skew_s: float) -> LeaseError:
    return LeaseError(
        f"store = {store.url!r} is in use by {_describe(record)}",
        f"wait for it; without another heartbeat it can be taken after {_clock(record.expires + skew_s)}; if that "
        "process is dead, run again with --take-over",
    )


def _describe(record: LeaseRecord) -> str:
    return (
        f"run {record.run}: process {record.pid} on {record.host}, since {_clock(record.since)}, "
        f"last heartbeat {_clock(record.heartbeat)}, expires {_clock(record.expires)}"
    )


def _clock(seconds: float) -> str:
    seconds = min(max(seconds, 0.0), _LAST_S)
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds").replace("+00:00", " UTC")


@dataclass(frozen=True)
class RunInputs:
    """The corpus version and the recipe that a run works on."""

    corpus_version: str
    recipe: str


def put_inputs(store: Store, run: str, inputs: RunInputs) -> None:
    """Store the inputs of a run, so that `prag gc` keeps everything from which the run would resume."""
    store.put_json(f"runs/{run}/inputs.json", seal(asdict(inputs)))


def put_config(store: Store, run: str, text: str) -> None:
    """Store the configuration of a run, as a text."""
    store.put(f"runs/{run}/config.yaml", text.encode())


def find_config(store: Store, inputs: RunInputs) -> tuple[str, str] | None:
    """Return the newest run that worked on these inputs and its configuration, as a text; None if there is none.

    Raises:
        StoreError: if the store cannot be read, or the inputs of a run are damaged.
    """
    runs = {posixpath.dirname(name).partition("/")[2] for name in store.list("runs", "/config.yaml")}
    for run in sorted(runs, key=lambda run: run.split("-")[-2:], reverse=True):  # without the command's name
        if not store.exists(name := f"runs/{run}/inputs.json"):
            continue
        if from_dict(RunInputs, store.get_sealed(name, "corpus_version", "recipe")) == inputs:
            return run, store.get(f"runs/{run}/config.yaml").decode("utf-8", "replace")
    return None
