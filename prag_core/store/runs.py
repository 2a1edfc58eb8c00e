"""The run lease: `runs/lease.json` says which run works on a store, so that two do not interleave.

The lease is taken, renewed and given back by conditional writes, so of two runs at once exactly one has it. Whoever
holds it writes a heartbeat into it; when none came for `ttl_s`, the next run takes it over. A lease is courtesy, not
safety: objects are immutable and commits come last, so that a run which lost it wastes work but corrupts nothing.

Clocks: a heartbeat carries its holder's time, and another machine compares that with its own. A lease counts as
expired only `skew_s` after it says so; clocks that differ by less are harmless. With more, a live lease can be taken
over, which its holder notices at its next heartbeat, or a dead one is waited for longer.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from prag_core.errors import ConflictError, LeaseError, StoreError
from prag_core.identity import seal
from prag_core.records import from_dict
from prag_core.store.objects import Store

LEASE = "runs/lease.json"
TTL_S = 120.0
SKEW_S = 30.0
BEATS_PER_TTL = 4


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """What `runs/lease.json` says. Times are in seconds since the epoch, by the holder's clock.

    `token` is the holder's own, so that no two records are alike. `machine` tells whether its process could be
    seen from another one, and `started` when that began, so that a later process of the same number is not taken
    for it; both are empty where the system does not say.
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
        """When it expires, unless another heartbeat comes."""
        return self.heartbeat + self.ttl_s


class RunLease:
    """A held lease, which a thread renews until `release`. Made by `acquire_lease`."""

    def __init__(self, store: Store, record: LeaseRecord) -> None:
        self._store = store
        self._record = record
        self._confirmed = time.monotonic()
        self._taken = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()

    @property
    def record(self) -> LeaseRecord:
        """What this lease last said in the store."""
        return self._record

    @property
    def lost(self) -> bool:
        """Whether another run has taken it over, or may have since no heartbeat could be written."""
        return bool(self._taken) or time.monotonic() - self._confirmed > self._record.ttl_s

    def check(self) -> None:
        """Do nothing while the lease is held.

        Raises:
            LeaseError: when it is lost: whoever works under it should stop.
        """
        if self._taken:
            raise LeaseError(
                f"store = {self._store.url!r}: the lease of run {self._record.run} was {self._taken}",
                "let that run go on; what this one has committed stays, and running again resumes",
            )
        if self.lost:
            raise LeaseError(
                f"store = {self._store.url!r}: the lease of run {self._record.run} could not be renewed for "
                f"{time.monotonic() - self._confirmed:.0f} s, and may be another's now",
                "check the store, and run again; what was committed stays",
            )

    def release(self) -> None:
        """End the heartbeat and give the lease back; one that is lost, or that cannot be written, is left alone."""
        self._ended.set()
        self._thread.join(self._record.ttl_s)
        if not self._thread.is_alive():
            with contextlib.suppress(StoreError):  # it expires by itself
                self._renew(released=True)

    def _beat(self) -> None:
        while not self._ended.wait(self._record.ttl_s / BEATS_PER_TTL):
            with contextlib.suppress(StoreError):  # the store is away: `lost` says so when it stays away
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
            self._store.swap(LEASE, data, _encode(renewed))  # our own heartbeat, of which no answer had come
        self._record = renewed
        self._confirmed = begun


def acquire_lease(
    store: Store, run: str, *, ttl_s: float = TTL_S, skew_s: float = SKEW_S, take_over: bool = False
) -> RunLease:
    """Take the store's lease for a run.

    A lease that was released or has expired is taken, and one whose process was on this machine and is gone.

    Args:
        store: The store.
        run: The run's id, which others are told.
        ttl_s: How long the lease lasts after its last heartbeat.
        skew_s: How far the clocks of two machines may differ.
        take_over: Take it from a run that still holds it, because it is known to be dead; also one that cannot be
            read.

    Raises:
        LeaseError: when another run holds it: who, where, since when, until when, and how to take it over.
        StoreError: when the store cannot be read or written, or has no conditional write.
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
    if held is not None and not (take_over or held.released or _is_over(held, now, skew_s)):
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
    """Hold the store's lease while a block runs, and give it back at its end; see `acquire_lease`.

    Raises:
        LeaseError: when another run holds it, or at the end of the block when it was lost meanwhile.
        StoreError: as `acquire_lease` does.
    """
    lease = acquire_lease(store, run, ttl_s=ttl_s, skew_s=skew_s, take_over=take_over)
    try:
        yield lease
        lease.check()
    finally:
        lease.release()


def check_holder(store: Store, run: str) -> None:
    """Do nothing unless the store's lease names another run than `run`: for whoever works for a run elsewhere.

    An actor whose driver was killed, and whose cluster did not notice yet, so stores nothing any more once another
    run has taken the lease.

    Raises:
        LeaseError: when another run has the lease.
        StoreError: when the lease cannot be read.
    """
    record = read_lease(store)
    if record is not None and record.run != run:
        raise LeaseError(
            f"store = {store.url!r}: the lease of run {run} was taken over by {_describe(record)}",
            "let that run go on; what this one has committed stays, and running again resumes",
        )


def wait_for_lease(
    store: Store, wait_s: float, *, skew_s: float = SKEW_S, look_every_s: float = 2.0
) -> LeaseRecord | None:
    """Wait until no run holds the store's lease, `wait_s` at most; return who holds it still, or None.

    A job that is started again after its machine was lost finds its own dead lease, which expires.

    Raises:
        StoreError: when the store cannot be read.
    """
    deadline = time.monotonic() + wait_s
    while True:
        held = _read(store)[1]
        if held is None or held.released or _is_over(held, time.time(), skew_s):
            return None
        left = deadline - time.monotonic()
        if left <= 0:
            return held
        time.sleep(min(look_every_s, left))


def read_lease(store: Store) -> LeaseRecord | None:
    """Return what the store's lease says, or None when no run ever took it.

    Raises:
        StoreError: when it cannot be read.
    """
    return _read(store)[1]


def _read(store: Store) -> tuple[bytes | None, LeaseRecord | None]:
    data = store.get_if_exists(LEASE)
    if data is None:
        return None, None
    try:
        return data, from_dict(LeaseRecord, json.loads(data))
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{store.url}/{LEASE}: not a lease: {error}", "no run at work? then run again with --take-over"
        ) from None


def _encode(record: LeaseRecord) -> bytes:
    return json.dumps(asdict(record), sort_keys=True).encode()


def _is_over(record: LeaseRecord, now: float, skew_s: float) -> bool:
    return now > record.expires + skew_s or _is_dead(record)


def _is_dead(record: LeaseRecord) -> bool:
    """Whether the holder's process was one that would be seen from here, and is not there."""
    if not record.machine or record.machine != _machine():
        return False
    try:
        os.kill(record.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    state, started = _process(record.pid)
    # A process that was killed keeps its number until its parent asks for it, and then another may get it.
    return state in ("Z", "X") or bool(record.started and started and record.started != started)


def _process(pid: int) -> tuple[str, str]:
    """Return a process's state (a letter) and when it began (in ticks since the machine did), or empty strings."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _machine() -> str:
    """Name this boot of this machine and this view of its processes (a container has its own)."""
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
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds").replace("+00:00", " UTC")


@dataclass(frozen=True)
class RunInputs:
    """What a run works on: its corpus version and its recipe."""

    corpus_version: str
    recipe: str


def put_inputs(store: Store, run: str, inputs: RunInputs) -> None:
    """Note what a run works on, so that no collection takes away what it would resume from."""
    store.put_json(f"runs/{run}/inputs.json", seal(asdict(inputs)))
