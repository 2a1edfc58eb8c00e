"""The way of a question from any route to the service: within the caller's rate, with a deadline, and counted."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Coroutine
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
    """Passes questions to a service.

    Args:
        service: Answers them.
        config: The limits.
        metrics: Counts them.
        limiter: Holds each caller to its rate.
    """

    def __init__(self, service: Service, config: Config, metrics: Metrics, limiter: RateLimiter) -> None:
        self.service = service
        self.config = config
        self._metrics = metrics
        self._limiter = limiter

    def admit(self, caller: Caller, questions: int = 1) -> None:
        """Charge questions to a caller's rate.

        Raises:
            ApiError: 429 when the rate is used up.
        """
        if wait_s := self._limiter.take(caller, questions):
            raise ApiError(429, "rate_limited", "this key asks more often than it may", retry_after_s=wait_s)

    async def answer(self, route: str, request: Request, deadline_s: float | None) -> Answer:
        """Answer a question.

        Raises:
            ApiError: when it cannot be answered.
        """
        with self._metrics.question(route, request.mode) as recorder:
            try:
                answer = await self.service.answer(request, deadline_s=self._deadline(deadline_s))
            except Exception as error:
                shown = api_error(error)
                recorder.code = shown.code
                raise shown from error
            recorder.answer(answer)
            _log_fallbacks(answer)
            return answer

    async def stream(self, route: str, request: Request, deadline_s: float | None) -> AsyncGenerator[str | Answer]:
        """Yield the pieces of an answer's text, then the answer. Closing the generator cancels the request.

        Raises:
            ApiError: when the question cannot be answered.
        """
        with self._metrics.question(route, request.mode) as recorder:
            try:
                async with aclosing(self.service.stream(request, deadline_s=self._deadline(deadline_s))) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Answer):
                            recorder.answer(piece)
                            _log_fallbacks(piece)
                        else:
                            recorder.text()
                        yield piece
            except Exception as error:
                shown = api_error(error)
                recorder.code = shown.code
                raise shown from error

    def _deadline(self, wanted_s: float | None) -> float:
        return min(wanted_s or self.config.serve.deadline_s, self.config.serve.deadline_s)


def _log_fallbacks(answer: Answer) -> None:
    for passage in answer.passages:
        if passage.note:
            logger.warning("passage %s is in the prompt instead of the weights: %s", passage.key, passage.note)


def batch_width(limits: ServeConfig) -> int:
    """Return how many questions of a batch run at once: half of the slots, so that other requests find room."""
    return max(1, limits.slots // 2)


def longest_s(limits: ServeConfig) -> float:
    """Return the longest time of an HTTP request, in seconds: a full batch whose questions all take their deadline."""
    return limits.deadline_s * math.ceil(limits.max_batch / batch_width(limits))


async def while_connected(http: fastapi.Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it when the client disconnects first.

    Raises:
        ApiError: when the client has disconnected; nobody will read it.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "cancelled", "the client disconnected")
        return task.result()
    finally:
        gone.cancel()
        if task.cancel():
            # Its slot may not be free before it has ended.
            await asyncio.wait({task})


async def _disconnected(http: fastapi.Request) -> None:
    await http.body()
    while (await http.receive())["type"] != "http.disconnect":
        pass
