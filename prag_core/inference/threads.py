"""The service's search thread, and helpers that connect threads with an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from prag_core.errors import DeadlineError, EngineStuckError

T = TypeVar("T")
P = ParamSpec("P")


class SearchThread:
    """Runs functions that search or write prompts, one after the other; Lucene serves one caller at a time anyway.

    A search that is stuck in Java cannot be interrupted; `check` reports it.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._begun: float | None = None
        self._idle = threading.Event()
        self._idle.set()

    def submit(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a function call; one that is cancelled before it starts never runs."""
        return self._pool.submit(self._run, partial(job, *args, **kwargs))

    def check(self, stuck_s: float) -> None:
        """Check that the running call does not take too long.

        Raises:
            EngineStuckError: when it started more than `stuck_s` seconds ago.
        """
        begun = self._begun
        if begun is not None and (elapsed_s := time.monotonic() - begun) > stuck_s:
            raise EngineStuckError(
                f"a search has not ended for {elapsed_s:.1f} s", "replace this replica, or raise serve.stuck_s"
            )

    def close(self, wait_s: float) -> bool:
        """Accept no more calls; returns whether the running one ended within `wait_s` seconds."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        return self._idle.wait(wait_s)

    def _run(self, job: Callable[[], T]) -> T:
        self._idle.clear()
        self._begun = time.monotonic()
        try:
            return job()
        finally:
            self._begun = None
            self._idle.set()


async def wait_until(deadline: float | None, awaited: Awaitable[T]) -> T:
    """Await something until a deadline, in seconds of `time.monotonic`; None for no deadline.

    Raises:
        DeadlineError: when the deadline has passed.
    """
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
            return await awaited
    except TimeoutError:
        raise DeadlineError(
            "the request was not answered before its deadline", "allow more time, or ask for fewer tokens"
        ) from None


def thread_safe_put(loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[T]) -> Callable[[T], None]:
    """Return a function that puts an event into the queue of an event loop from another thread."""

    def put(event: T) -> None:
        # On a closed loop nobody waits for the event.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(inbox.put_nowait, event)

    return put
