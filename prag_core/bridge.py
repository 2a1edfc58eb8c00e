"""From threads to an event loop: waiting until a deadline, and events that other threads send."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from prag_core.errors import DeadlineError

T = TypeVar("T")


async def within(deadline: float | None, awaited: Awaitable[T]) -> T:
    """Await something until a deadline on the monotonic clock.

    Raises:
        DeadlineError: when it has passed.
    """
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
            return await awaited
    except TimeoutError:
        raise DeadlineError(
            "the request was not answered before its deadline", "allow more time, or ask for fewer tokens"
        ) from None


def putter(loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[T]) -> Callable[[T], None]:
    """Return what puts an event into an inbox from another thread."""

    def put(event: T) -> None:
        # A loop that was closed has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(inbox.put_nowait, event)

    return put
