"""How a signal stops a command: the command goes no further, what it holds is given back, and the process ends.

A command runs in a thread of its own, while the main thread waits. Python calls signal handlers in the main thread
alone, so a signal never interrupts the command inside a lock or a half-finished step.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import typer

from pipelines.cli.terminal import out, progress_to

# Giving back what a command holds may wait for the store. A lease that is not given back expires.
GIVE_BACK_S = 3.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ENDED = 0


def _run_it_again() -> str:
    return f"Run the same command again to continue: {shlex.join(['prag', *sys.argv[1:]])}"


@dataclass
class Stop:
    """How the command at work is to be stopped. Commands find it by `stop_of`.

    Attributes:
        remedy: What to do next, for people.
        awaited: Whether the command ends by itself once `noted` is set; otherwise it is ended where it stands.
        noted: Set when a signal has come.
    """

    remedy: str = field(default_factory=_run_it_again)
    awaited: bool = False
    noted: threading.Event = field(default_factory=threading.Event)


def stop_of(context: typer.Context) -> Stop:
    """Return how a command is to be stopped; the command may change that while it runs."""
    return context.ensure_object(Stop)


def run_until_stopped(command: Callable[[Stop], object]) -> None:
    """Run a command until it ends, or until SIGINT, SIGTERM or SIGHUP comes; a second signal ends the process at once.

    SIGHUP comes when the terminal is closed. Under `nohup` it is ignored, and stays so.

    A stopped process gives back what it holds, such as the store's lease, says what to do next, and ends with 128 and
    the signal's number. The processes that it started end with it.

    Raises:
        BaseException: what the command raised, such as SystemExit with its exit code.
    """
    stop, code = Stop(), 0
    raised: list[BaseException] = []
    with _messages() as (reader, writer):

        def work() -> None:
            try:
                command(stop)
            except BaseException as error:
                raised.append(error)
            os.write(writer, bytes([_ENDED]))

        threading.Thread(target=work, name="command", daemon=True).start()
        while (number := os.read(reader, 1)[0]) != _ENDED or (code and not stop.awaited):
            if number not in _SIGNALS:
                continue
            if code:
                os._exit(128 + number)
            code = 128 + number
            stop.noted.set()
            if not stop.awaited:
                threading.Thread(target=_end, args=(code, stop.remedy), daemon=True).start()
        if code:
            _end(code, stop.remedy)
    if raised:
        raise raised[0]


@contextlib.contextmanager
def _messages() -> Iterator[tuple[int, int]]:
    """Yield the two ends of a pipe into which each signal writes its number, and anybody another byte.

    A lock instead of a pipe would not do: a library's C handler (polars has one) may let the main thread wait on.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    hung_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM, *hung_up)}
    try:
        yield reader, writer
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(pipe_before)
        os.close(reader)
        os.close(writer)


def _end(code: int, remedy: str) -> NoReturn:
    """Give back what this process holds, for some seconds at most, and end it with all that it started."""
    # From now on the command's thread may fail in any way; nobody needs to read how.
    threading.excepthook = lambda _: None
    sys.unraisablehook = lambda _: None
    giving_back = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
    giving_back.start()
    giving_back.join(GIVE_BACK_S)
    _kill_children()
    for console in (out, progress_to):
        console.show_cursor()  # a progress bar hides it
    with contextlib.suppress(OSError, ValueError):  # e.g. nobody reads it any more
        progress_to.print(f"\nStopped. {remedy}", soft_wrap=True, highlight=False)
        out.file.flush()
        progress_to.file.flush()
    os._exit(code)


def _kill_children() -> None:
    """Kill what this process has started, such as Ray: some of it would outlive it by half a minute."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
