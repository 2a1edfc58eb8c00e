"""The HTTP API: questions, many of them, and what an operator asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from pipelines.serving.api_keys import KeyRing
from pipelines.serving.dispatcher import Dispatcher, batch_width, while_connected
from pipelines.serving.errors import ApiError, ErrorResponse, add_error_handlers, api_error
from pipelines.serving.middleware import Caller, Guard
from pipelines.serving.openai_api import openai_routes
from pipelines.serving.page import page_routes
from pipelines.serving.schemas import (
    AnswerRequest,
    AnswerResponse,
    BatchItem,
    BatchRequest,
    BatchResponse,
    Health,
    Ready,
    from_answer,
    to_request,
)
from pipelines.serving.sse import EVENTS, EventStream, event
from prag_core.errors import EngineStuckError
from prag_core.records import Answer

_ERRORS = {
    400: "the body is not JSON",
    401: "no valid key",
    413: "the body is too large",
    422: "a field is wrong or beyond a limit",
    429: "this key asks too often (Retry-After)",
    500: "the model's output is not finite",
    503: "too much to do, or not able to (Retry-After)",
    504: "the deadline has passed",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in _ERRORS.items()
}

# Gives the numbers of all replicas in Prometheus's text format.
Scrape = Callable[[], Awaitable[str]]


def make_app(desk: Dispatcher, keys: KeyRing | None, scrape: Scrape) -> FastAPI:
    """Return the whole application.

    Args:
        desk: Where questions go.
        keys: The keys that callers must have; None when none are needed.
        scrape: What `/metrics` shows.
    """
    # Documentation pages would load scripts from the internet; the document itself is at /openapi.json.
    app = FastAPI(
        title="Parametric RAG",
        version="1",
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    add_error_handlers(app)
    app.include_router(answer_routes(desk))
    app.include_router(openai_routes(desk))
    app.include_router(operator_routes(desk, scrape))
    app.include_router(page_routes())
    app.add_middleware(Guard, keys=keys, config=desk.config.serve)
    return app


def answer_routes(desk: Dispatcher) -> APIRouter:
    """Return `/v1/answer` and `/v1/batch`."""
    routes = APIRouter(prefix="/v1", tags=["questions"], responses=ERROR_RESPONSES)

    @routes.post(
        "/answer",
        response_model=AnswerResponse,
        responses={200: {"content": EVENTS}},
    )
    async def answer(body: AnswerRequest, http: Request) -> Any:
        """Answer a question.

        With `stream`, the text comes as server-sent events `{"text": …}` while it is made, and the whole answer as
        the last one, named `answer`; what goes wrong after the first is an event named `error`.
        """
        caller: Caller = http.state.caller
        request = to_request(body, desk.config, caller.access)
        desk.admit(caller)
        if not body.stream:
            return from_answer(await while_connected(http, desk.answer("answer", request, body.deadline_s)))
        pieces = desk.stream("answer", request, body.deadline_s)
        return await while_connected(http, EventStream.begin(_events(pieces)))

    @routes.post("/batch", response_model=BatchResponse)
    async def batch(body: BatchRequest, http: Request) -> BatchResponse:
        """Answer many questions; each gets its answer or its own error, in their order.

        Some are under way at once, and `deadline_s` counts for each from its own beginning.
        """
        caller: Caller = http.state.caller
        most = desk.config.serve.max_batch
        if len(body.requests) > most:
            raise ApiError(422, "limit_exceeded", f"requests: at most {most}", "requests")
        if any(item.stream for item in body.requests):
            raise ApiError(422, "invalid_request", "requests: a question of a batch cannot stream", "requests")
        desk.admit(caller, len(body.requests))
        together = asyncio.Semaphore(batch_width(desk.config.serve))

        async def one(item: AnswerRequest) -> BatchItem:
            try:
                request = to_request(item, desk.config, caller.access)
                async with together:
                    # Its deadline begins now: what waits for others of its batch does not come late for that.
                    return BatchItem(answer=from_answer(await desk.answer("batch", request, item.deadline_s)))
            except ApiError as error:
                return BatchItem(error=error.body())

        async def all_of_them() -> list[BatchItem]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(item)) for item in body.requests]
            return [task.result() for task in tasks]

        return BatchResponse(answers=await while_connected(http, all_of_them()))

    return routes


def operator_routes(desk: Dispatcher, scrape: Scrape) -> APIRouter:
    """Return `/healthz`, `/readyz` and `/metrics`."""
    routes = APIRouter(tags=["operation"])

    @routes.get("/healthz", response_model=Health, responses={503: ERROR_RESPONSES[503]})
    async def healthz() -> Health:
        """Say whether this replica is alive: its decoder makes steps, and its searches end."""
        try:
            desk.service.check()
        except EngineStuckError as error:
            raise api_error(error) from error
        return Health()

    @routes.get("/readyz", response_model=Ready, responses={503: ERROR_RESPONSES[503]})
    async def readyz() -> Ready:
        """Say whether questions are answered, and from which snapshot."""
        await healthz()
        return Ready(snapshot=desk.service.snapshot)

    @routes.get("/metrics", response_class=PlainTextResponse, responses={401: ERROR_RESPONSES[401]})
    async def metrics() -> Response:
        """Show the numbers of all replicas in Prometheus's text format; docs/serving.md says what each means."""
        return PlainTextResponse(await scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


async def _events(pieces: AsyncGenerator[str | Answer]) -> AsyncGenerator[str]:
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Answer):
                yield event(from_answer(piece).model_dump(), "answer")
            else:
                yield event({"text": piece})
