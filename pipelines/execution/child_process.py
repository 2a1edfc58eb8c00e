"""A child process holds an actor: it gets tables of passages through a pipe and answers each with outcomes.

Its parent sees how it ends, and can kill it. Children are forked from a process that has imported their modules, so
that the next one is ready in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.session import SessionError, socket_folder
from prag_core.errors import PragError
from prag_core.llm.memory import is_out_of_memory

# Between two checks of the child's memory; it may grow beyond its limit for as long.
_POLL_S = 0.1
# A process whose pipe is closed ends soon: the kernel frees its memory first.
_EXIT_TIMEOUT_S = 30.0
_SET_PARENT_DEATH_SIGNAL = 1


# An actor calls this whenever it has made progress, so that a slow actor is not taken for one that hangs.
Heartbeat = Callable[[], None]


@dataclass(frozen=True)
class Limits:
    """How long a child may work without a sign of life (outcomes, or a heartbeat), and how much memory it may hold."""

    silence_s: float
    memory_bytes: float


class ChildLostError(Exception):
    """A child died, was killed for exceeding a limit, or raised an unexpected error; it cannot be used any more.

    `reason` is `killed_worker`, `out_of_memory`, `timeout` or `failed`. `starting` says that it had not yet begun to
    work.
    """

    def __init__(self, reason: str, detail: str, *, starting: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.starting = starting


class Child:
    """A child process that holds `actor(*arguments)`, given as the pickled pair, and calls it with tables.

    Args:
        work: The pickled pair; only the child unpickles it, so that its parent need not import the actor's module.
            The actor is called with a table and a `Heartbeat`.
        preload: The modules that the process from which children are forked imports beforehand.

    Raises:
        ChildLostError: when the system has no process or pipe left for it.
    """

    def __init__(self, work: bytes, preload: Sequence[str]) -> None:
        # The process from which children are forked finds modules where this one does.
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(list(preload))
            self._connection, end = context.Pipe()
            self._process = context.Process(target=_serve, args=(end, work), daemon=True)
            with _short_temporary_folder():
                self._process.start()
        except (OSError, EOFError, SessionError) as error:  # EOF: the process from which children are forked has died
            raise ChildLostError("failed", f"it cannot be started: {error}", starting=True) from None
        end.close()
        self._ready = False

    def call(self, table: pa.Table, limits: Limits) -> Iterator[pa.Table]:
        """Yield the actor's outcomes for a table as they come.

        Raises:
            ChildLostError: when the child did not survive it.
            PragError: when the actor raised one; the child has ended with it.
        """
        if not self._ready:
            # Loading a model has no time limit; Ray ends a stage in which nothing ever moves.
            self._receive(replace(limits, silence_s=float("inf")), starting=True)
            self._ready = True
        try:
            self._connection.send_bytes(_pack(table))
        except OSError as error:  # it died between two calls
            raise self._lost(*self._cause_of_death(error), starting=False) from None
        while data := self._receive(limits, starting=False):
            yield _unpack(data)

    def kill(self) -> None:
        """End the child at once."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self, limits: Limits, *, starting: bool) -> bytes:
        deadline = time.monotonic() + limits.silence_s
        while True:
            ready = wait([self._connection, self._process.sentinel], _POLL_S)
            if self._connection in ready:
                try:
                    kind, data = pickle.loads(self._connection.recv_bytes())
                except (EOFError, OSError) as error:
                    raise self._lost(*self._cause_of_death(error), starting=starting) from None
                if kind == "answer":
                    return bytes(data)
                if kind == "raised":
                    raise data
                if kind == "lost":
                    raise self._lost(*data, starting=starting)
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
        self.kill()
        return ChildLostError(reason, detail, starting=starting)

    def _cause_of_death(self, error: Exception | None = None) -> tuple[str, str]:
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


def _serve(connection: Connection, work: bytes) -> None:
    _die_with_parent()
    # A crash writes its stack to the worker's log. A JVM uses the same signals, but this process has none.
    faulthandler.enable()

    def heartbeat() -> None:
        _send(connection, "heartbeat", b"")

    try:
        actor, arguments = pickle.loads(work)
        call = actor(*arguments)
        _send(connection, "answer", b"")
        while True:
            try:
                table = _unpack(connection.recv_bytes())
            except EOFError:
                return
            result = call(table, heartbeat)
            for done in [result] if isinstance(result, pa.Table) else result:
                _send(connection, "answer", _pack(done))
            _send(connection, "answer", b"")
    except PragError as error:
        _send(connection, "raised", error)
    except BaseException as error:
        _send(connection, "lost", _explain(error))
        raise


def _explain(error: BaseException) -> tuple[str, str]:
    text = f"{type(error).__name__}: {error}"[:300]
    return ("out_of_memory" if is_out_of_memory(error) else "failed"), text


def _send(connection: Connection, kind: str, data: Any) -> None:
    connection.send_bytes(pickle.dumps((kind, data)))


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
