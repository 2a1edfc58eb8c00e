"""A job that is done again and again as long as a replica lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from prag_core.errors import EngineStuckError, PragError

logger = logging.getLogger(__name__)


class Follower:
    """Does a job again and again in the running event loop; what goes wrong in it is logged, and no reason to end.

    Args:
        job: What is done.
        every_s: Seconds before each time.
        failed: Called when it went wrong.
    """

    def __init__(self, job: Callable[[], Awaitable[None]], every_s: float, failed: Callable[[], None]) -> None:
        self._job = job
        self._every_s = every_s
        self._failed = failed
        self._task = asyncio.create_task(self._run())

    def check(self) -> None:
        """Check that it goes on.

        Raises:
            EngineStuckError: when it has ended.
        """
        if self._task.done():
            raise EngineStuckError("nothing looks for new snapshots any more", "replace this replica")

    def end(self) -> None:
        """Do it no more."""
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self._job()
            except Exception as error:  # a document by a newer version, a bug: the next look may find it mended
                self._failed()
                if isinstance(error, PragError):
                    logger.warning("no new snapshot: %s", error)
                else:
                    logger.exception("no new snapshot")
