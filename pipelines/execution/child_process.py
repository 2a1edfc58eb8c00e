"""A child process holds an actor: it gets tables of passages through pipes and answers each with outcomes.

Its parent sees how it ends, and can kill it. Children are forked from a process that has imported their modules, so
that the next one is ready in a fraction of a second.

A child may hold two batches. Its main thread works on one batch after the other; threads beside it prepare the next
batch, and finish the one before, so that the main thread's device does not wait for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from cluster.session import SessionError, socket_folder
from prag_core.errors import PragError
from prag_core.llm.memory import is_out_of_memory

# Between two checks of the child's memory; it may grow beyond its limit for as long.
_POLL_S = 0.1
# A process whose pipe is closed ends soon: the kernel frees its memory first.
_EXIT_TIMEOUT_S = 30.0
_SET_PARENT_DEATH_SIGNAL = 1


# An actor calls this whenever it has made progress, with the share of its batch that is done (0 to 1), so that a slow
# actor is not taken for one that hangs, and people see how far it is.
Heartbeat = Callable[[float], None]
# What is left to do for some passages of a batch while the actor works on: it returns their outcomes.
Finish = Callable[[], pa.Table]


class Actor(Protocol):
    """What a child holds. Batches pass through it in the order in which they came."""

    def prepare(self, table: pa.Table) -> Any:
        """Return what `__call__` needs of a batch. It is called in another thread, beside the batch before."""
        ...

    def __call__(self, prepared: Any, heartbeat: Heartbeat) -> Iterable[pa.Table | Finish]:
        """Work on a prepared batch: yield outcomes, or what is left to do for them.

        What is left is done in another thread and in order, one at a time: before it yields the next, this waits for
        the one before.
        """
        ...


@dataclass(frozen=True)
class Limits:
    """How long a child may work without a sign of life (outcomes, or a heartbeat), and how much memory it may hold."""

    silence_s: float
    memory_bytes: float


class ChildLostError(Exception):
    """A child died, was killed for exceeding a limit, or raised an unexpected error; it cannot be used any more.

    `reason` is `killed_worker`, `out_of_memory`, `timeout` or `failed`. `starting` says that it had not yet begun to
    work on the batch, and `shared` that it held another batch too, which may have been the cause.
    """

    def __init__(self, reason: str, detail: str, *, starting: bool = False, shared: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.starting = starting
        self.shared = shared


class _Lane:
    """The way of one batch at a time to the child and of its outcomes back; `end` is the child's end of the pipe."""

    def __init__(self, connection: Connection, end: Connection) -> None:
        self.connection = connection
        self.end = end
        self.ready = False


class Child:
    """A child process that holds `actor(*arguments)`, given as the pickled pair, and calls it with tables.

    Args:
        work: The pickled pair; only the child unpickles it, so that its parent need not import the actor's module.
            The actor is an `Actor`.
        preload: The modules that the process from which children are forked imports beforehand.
        lanes: The most batches that it holds; so many threads may be in `call`.

    Raises:
        ChildLostError: when the system has no process or pipe left for it.
    """

    def __init__(self, work: bytes, preload: Sequence[str], lanes: int = 1) -> None:
        # The process from which children are forked finds modules where this one does.
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(list(preload))
            self._lanes = [_Lane(*context.Pipe()) for _ in range(lanes)]
            ends = [lane.end for lane in self._lanes]
            self._process = context.Process(target=_serve, args=(ends, work), daemon=True)
            with _short_temporary_folder():
                self._process.start()
        except (OSError, EOFError, SessionError) as error:  # EOF: the process from which children are forked has died
            raise ChildLostError("failed", f"it cannot be started: {error}", starting=True) from None
        for lane in self._lanes:
            lane.end.close()
        self._free = list(self._lanes)
        self._lock = threading.Lock()
        # Whether it held several batches when it was lost; None as long as it lives.
        self._shared: bool | None = None

    def call(self, table: pa.Table, limits: Limits, on_progress: Heartbeat = lambda share: None) -> Iterator[pa.Table]:
        """Yield the actor's outcomes for a table as they come; `on_progress` is called with each of its heartbeats.

        Raises:
            ChildLostError: when the child did not survive it.
            PragError: when the actor raised one, for this table or for another that the child held; it has ended.
        """
        with self._lock:
            lane = self._free.pop()
        try:
            if not lane.ready:
                # Loading a model has no time limit; Ray ends a stage in which nothing ever moves.
                self._receive(lane, replace(limits, silence_s=float("inf")), on_progress, starting=True)
                lane.ready = True
            try:
                lane.connection.send_bytes(_pack(table))
            except OSError as error:  # it died between two calls
                raise self._lost(*self._cause_of_death(error), starting=True) from None
            while data := self._receive(lane, limits, on_progress, starting=False):
                yield _unpack(data)
        finally:
            with self._lock:
                self._free.append(lane)

    def kill(self) -> None:
        """End the child at once."""
        with self._lock:
            self._process.kill()
            self._process.join()

    def _receive(self, lane: _Lane, limits: Limits, on_progress: Heartbeat, *, starting: bool) -> bytes:
        deadline = time.monotonic() + limits.silence_s
        while True:
            ready = wait([lane.connection, self._process.sentinel], _POLL_S)
            if lane.connection in ready:
                try:
                    kind, data = pickle.loads(lane.connection.recv_bytes())
                except (EOFError, OSError) as error:
                    raise self._lost(*self._cause_of_death(error), starting=starting) from None
                if kind == "answer":
                    return bytes(data)
                if kind == "raised":
                    self._note_end()
                    raise data
                if kind == "lost":
                    raise self._lost(*data, starting=starting)
                if data is not None:
                    on_progress(data)
                deadline = time.monotonic() + limits.silence_s
            elif ready:
                raise self._lost(*self._cause_of_death(), starting=starting)
            resident = _resident_bytes(self._process.pid)
            if resident > limits.memory_bytes:
                detail = f"it held {resident / 1e9:.1f} GB, more than its share of {limits.memory_bytes / 1e9:.1f} GB"
                raise self._lost("out_of_memory", detail, starting=starting)
            if time.monotonic() > deadline:
                detail = f"no sign of life for {limits.silence_s:.0f} s"
                raise self._lost("timeout", detail, starting=starting)

    def _lost(self, reason: str, detail: str, *, starting: bool) -> ChildLostError:
        shared = self._note_end()
        self.kill()
        return ChildLostError(reason, detail, starting=starting, shared=shared)

    def _note_end(self) -> bool:
        """Return whether the child held several batches when the first of its callers learned of its end."""
        with self._lock:
            if self._shared is None:
                self._shared = len(self._lanes) - len(self._free) > 1
            return self._shared

    def _cause_of_death(self, error: Exception | None = None) -> tuple[str, str]:
        with self._lock:
            self._process.join(_EXIT_TIMEOUT_S)
            code = self._process.exitcode
        if code is None:
            return "failed", f"its process runs, but its pipe is broken: {error}"
        if code >= 0:
            return "killed_worker", f"its process ended with exit code {code}"
        name = signal.Signals(-code).name
        if -code == signal.SIGKILL:
            return "out_of_memory", f"its process was ended by {name}, as the kernel does when memory is short"
        return "killed_worker", f"its process was ended by {name}"


@contextlib.contextmanager
def _short_temporary_folder() -> Iterator[None]:
    """Let multiprocessing make its socket where a socket's path is short enough."""
    before, tempfile.tempdir = tempfile.tempdir, socket_folder()
    try:
        yield
    finally:
        tempfile.tempdir = before


def _serve(ends: Sequence[Connection], work: bytes) -> None:
    _die_with_parent()
    # A crash writes its stack to the worker's log. A JVM uses the same signals, but this process has none.
    faulthandler.enable()
    server = _Server([_ServedLane(end) for end in ends])
    try:
        actor, arguments = pickle.loads(work)
        server.run(actor(*arguments))
    except BaseException as error:
        server.end(error)


class _ServedLane:
    """The child's end of a lane; `busy` from when a batch has come until its last outcome is sent."""

    def __init__(self, connection: Connection) -> None:
        self.busy = False
        self._connection = connection
        self._sending = threading.Lock()

    def receive(self) -> pa.Table:
        table = _unpack(self._connection.recv_bytes())
        self.busy = True
        return table

    def send(self, kind: str, data: Any) -> None:
        with self._sending:
            self._connection.send_bytes(pickle.dumps((kind, data)))


class _Server:
    """Passes the batches of all lanes through an actor: prepared beside, worked on here, finished beside."""

    def __init__(self, lanes: Sequence[_ServedLane]) -> None:
        self._lanes = lanes
        self._prepared: queue.SimpleQueue[tuple[_ServedLane, Any]] = queue.SimpleQueue()
        self._beside = ThreadPoolExecutor(1, "finish")
        self._preparing = threading.Lock()
        self._ending = threading.Lock()
        self._working = False

    def run(self, actor: Actor) -> None:
        """Work on what comes; the process ends when the parent closes its ends."""
        for lane in self._lanes:
            lane.send("answer", b"")
            threading.Thread(target=self._prepare, args=(actor, lane), name="prepare", daemon=True).start()
        self._working = True
        unfinished: Future[None] | None = None
        while True:
            lane, prepared = self._prepared.get()
            for done in actor(prepared, partial(self._heartbeat, lane)):
                if isinstance(done, pa.Table):
                    lane.send("answer", _pack(done))
                    continue
                if unfinished is not None:
                    unfinished.result()
                unfinished = self._beside.submit(self._answer, lane, done)
            # After what is left to do for this batch.
            self._beside.submit(self._answer, lane, None)

    def end(self, error: BaseException) -> None:
        """Say why the child ends, after what is being finished, and end it."""
        self._beside.shutdown()
        self._end(error)

    def _prepare(self, actor: Actor, lane: _ServedLane) -> None:
        try:
            while True:
                try:
                    table = lane.receive()
                except (EOFError, ConnectionError):
                    # The parent is gone, and with it who would hear of what is done here. Another child may need the
                    # device on which this one computes, or hangs.
                    os._exit(0)
                with self._preparing:
                    self._prepared.put((lane, actor.prepare(table)))
        except BaseException as error:
            self._end(error)

    def _answer(self, lane: _ServedLane, finish: Finish | None) -> None:
        try:
            if finish is not None:
                lane.send("answer", _pack(finish()))
                return
            lane.busy = False
            lane.send("answer", b"")
        except BaseException as error:
            self._end(error)

    def _heartbeat(self, working: _ServedLane, share: float) -> None:
        # A batch that waits for another one is as alive as that.
        for lane in self._lanes:
            if lane.busy:
                lane.send("heartbeat", share if lane is working else None)

    def _end(self, error: BaseException) -> None:
        # Not released: the process ends, and what another thread says of its end would be a consequence.
        self._ending.acquire()
        known = isinstance(error, PragError)
        kind, data = ("raised", error) if known else ("lost", _explain(error))
        for lane in self._lanes:
            if lane.busy or not self._working:
                with contextlib.suppress(OSError):
                    lane.send(kind, data)
        if not known:
            traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(0 if known else 1)


def _explain(error: BaseException) -> tuple[str, str]:
    text = f"{type(error).__name__}: {error}"[:300]
    return ("out_of_memory" if is_out_of_memory(error) else "failed"), text


def _pack(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _unpack(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _die_with_parent() -> None:
    """Have the kernel kill this process when the one it was forked from ends, which ends with the worker."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _resident_bytes(pid: int | None) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # the process has just ended, or this system has no such file
        return 0
