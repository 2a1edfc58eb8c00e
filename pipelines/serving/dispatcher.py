"""Where a question is taken in, answered and counted, whatever route it came by."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import fastapi

from pipelines.serving.errors import ApiError, api_error
from pipelines.serving.metrics import Metrics
from pipelines.serving.middleware import Caller, RateLimiter
from prag_core.config import Config, ServeConfig
from prag_core.inference.request import Request
from prag_core.inference.service import Service
from prag_core.records import Answer

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Dispatcher:
    """Passes questions to a service: within the caller's rate, with a deadline, and counted.

    Args:
        service: What answers.
        config: The limits.
        metrics: Where it is counted.
        limiter: The callers' rates.
    """

    def __init__(self, service: Service, config: Config, metrics: Metrics, limiter: RateLimiter) -> None:
        self.service = service
        self.config = config
        self.metrics = metrics
        self.limiter = limiter

    def admit(self, caller: Caller, questions: int = 1) -> None:
        """Charge a caller's rate.

        Raises:
            ApiError: 429 when nothing of it is left.
        """
        if wait_s := self.limiter.take(caller, questions):
            raise ApiError(429, "rate_limited", "this key asks more often than it may", retry_after_s=wait_s)

    async def answer(self, route: str, request: Request, deadline_s: float | None) -> Answer:
        """Answer a question.

        Raises:
            ApiError: when it cannot be answered.
        """
        with self.metrics.question(route, request.mode) as watch:
            try:
                answer = await self.service.answer(request, deadline_s=self._deadline(deadline_s))
            except Exception as error:
                told = api_error(error)
                watch.code = told.code
                raise told from error
            watch.answer(answer)
            _log_fallbacks(answer)
            return answer

    async def stream(self, route: str, request: Request, deadline_s: float | None) -> AsyncIterator[str | Answer]:
        """Yield the pieces of an answer's text, and the answer last. Closing it cancels the request.

        Raises:
            ApiError: when it cannot be answered.
        """
        with self.metrics.question(route, request.mode) as watch:
            try:
                async with aclosing(self.service.stream(request, deadline_s=self._deadline(deadline_s))) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Answer):
                            watch.answer(piece)
                            _log_fallbacks(piece)
                        else:
                            watch.text()
                        yield piece
            except Exception as error:
                told = api_error(error)
                watch.code = told.code
                raise told from error

    def _deadline(self, wanted_s: float | None) -> float:
        return min(wanted_s or self.config.serve.deadline_s, self.config.serve.deadline_s)


def _log_fallbacks(answer: Answer) -> None:
    for passage in answer.passages:
        if passage.note:
            logger.warning("passage %s is in the prompt instead of the weights: %s", passage.key, passage.note)


def batch_width(limits: ServeConfig) -> int:
    """Return how many questions of a batch are under way at once: room is left for others, and in the queue."""
    return max(1, limits.slots // 2)


def longest_s(limits: ServeConfig) -> float:
    """Return the most seconds that an HTTP request takes: a full batch, each of whose questions takes its deadline."""
    return limits.deadline_s * math.ceil(limits.max_batch / batch_width(limits))


async def while_connected(http: fastapi.Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` gives; when the client goes away before that, it is cancelled.

    Raises:
        ApiError: when the client went away (nobody will read it).
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "cancelled", "the client went away")
        return task.result()
    finally:
        gone.cancel()
        if task.cancel():
            # Until it has ended, its place in the batch may not be free.
            await asyncio.wait({task})


async def _disconnected(http: fastapi.Request) -> None:
    await http.body()
    while (await http.receive())["type"] != "http.disconnect":
        pass
