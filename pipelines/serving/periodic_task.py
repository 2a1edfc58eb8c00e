"""A job that a replica repeats for as long as it lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from prag_core.errors import EngineStuckError, PragError

logger = logging.getLogger(__name__)


class PeriodicTask:
    """Repeats a job in the running event loop. A job that fails is logged, counted and repeated.

    Args:
        job: The job.
        every_s: Seconds to wait before each time.
        on_failure: Called when the job has failed.
    """

    def __init__(self, job: Callable[[], Awaitable[None]], every_s: float, on_failure: Callable[[], None]) -> None:
        self._job = job
        self._every_s = every_s
        self._on_failure = on_failure
        self._task = asyncio.create_task(self._run())

    def check(self) -> None:
        """Check that the job is still repeated.

        Raises:
            EngineStuckError: when it is not.
        """
        if self._task.done():
            raise EngineStuckError("this replica no longer checks for new snapshots", "replace it")

    def cancel(self) -> None:
        """Stop repeating the job."""
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self._job()
            except Exception as error:  # e.g. a document by a newer version, or a bug: it may work the next time
                self._on_failure()
                if isinstance(error, PragError):
                    logger.warning("no new snapshot: %s", error)
                else:
                    logger.exception("no new snapshot")
