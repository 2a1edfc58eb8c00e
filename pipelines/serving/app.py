"""The HTTP API: questions, batches of questions, and routes for operators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from pipelines.serving.api_keys import KeyRing
from pipelines.serving.dispatcher import Dispatcher, batch_width, while_connected
from pipelines.serving.errors import ApiError, ErrorResponse, add_error_handlers, api_error, check_limit, invalid_field
from pipelines.serving.middleware import AuthMiddleware, Caller
from pipelines.serving.openai_api import base_name, openai_routes
from pipelines.serving.page import docs_routes, page_routes
from pipelines.serving.schemas import (
    About,
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
from pipelines.serving.strict_route import StrictRoute
from prag_core.errors import EngineStuckError
from prag_core.records import Answer

_ERRORS = {
    400: "the body is not JSON",
    401: "no valid key",
    413: "the body is too large",
    415: "the header Content-Type is not application/json",
    422: "a field is wrong or beyond a limit",
    429: "this key asks too often (Retry-After)",
    500: "the model's output is not finite",
    503: "overloaded, or not able to answer (Retry-After)",
    504: "the deadline has passed",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in _ERRORS.items()
}

# Returns the metrics of all replicas in Prometheus's text format.
Scrape = Callable[[], Awaitable[str]]


def make_app(dispatcher: Dispatcher, keys: KeyRing | None, scrape: Scrape) -> FastAPI:
    """Return the whole application.

    Args:
        dispatcher: Answers questions.
        keys: The keys that callers must present; None when none are needed.
        scrape: Returns the text of `/metrics`.
    """
    # FastAPI's own pages would load scripts from the internet; see `docs_routes`.
    app = FastAPI(
        title="Parametric RAG",
        version="1",
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    add_error_handlers(app)
    app.include_router(answer_routes(dispatcher))
    app.include_router(openai_routes(dispatcher))
    app.include_router(operator_routes(dispatcher, scrape))
    app.include_router(page_routes())
    app.include_router(docs_routes())
    app.add_middleware(AuthMiddleware, keys=keys, config=dispatcher.config.serve)
    return app


def answer_routes(dispatcher: Dispatcher) -> APIRouter:
    """Return `/v1/about`, `/v1/answer` and `/v1/batch`."""
    routes = APIRouter(prefix="/v1", tags=["questions"], responses=ERROR_RESPONSES, route_class=StrictRoute)

    @routes.get("/about", response_model=About)
    async def about() -> About:
        """Say what answers here: the base model, the snapshot in service, the modes, and questions to try."""
        config = dispatcher.config
        return About(
            model=base_name(config),
            snapshot=dispatcher.service.snapshot,
            mode=config.answer.mode,
            modes=list(config.serve.modes),
            example_questions=list(config.serve.example_questions),
        )

    @routes.post(
        "/answer",
        response_model=AnswerResponse,
        responses={200: {"content": EVENTS}},
    )
    async def answer(body: AnswerRequest, http: Request) -> Any:
        """Answer a question.

        With `stream`, the text comes as server-sent events `{"text": …}` as it is made. The last event, named
        `answer`, is the whole answer. If answering fails after the first event, the last one is named `error`.
        """
        caller: Caller = http.state.caller
        request = to_request(body, dispatcher.config, caller.access)
        dispatcher.admit(caller)
        if not body.stream:
            made = await while_connected(http, dispatcher.answer("answer", request, body.deadline_s))
            return from_answer(made, body.details)
        pieces = dispatcher.stream("answer", request, body.deadline_s)
        return await while_connected(http, EventStream.begin(_events(pieces, body.details)))

    @routes.post("/batch", response_model=BatchResponse)
    async def batch(body: BatchRequest, http: Request) -> BatchResponse:
        """Answer many questions. Each gets its answer or its own error, in the order of the questions.

        Some run at once, and the `deadline_s` of each counts from its own beginning.
        """
        caller: Caller = http.state.caller
        check_limit("requests", len(body.requests), dispatcher.config.serve.max_batch)
        if any(item.stream for item in body.requests):
            raise invalid_field("requests", "a question of a batch cannot stream")
        dispatcher.admit(caller, len(body.requests))
        places = asyncio.Semaphore(batch_width(dispatcher.config.serve))

        async def one(item: AnswerRequest) -> BatchItem:
            try:
                request = to_request(item, dispatcher.config, caller.access)
                async with places:
                    # The deadline begins now: waiting for other questions of the batch does not count.
                    made = await dispatcher.answer("batch", request, item.deadline_s)
                    return BatchItem(answer=from_answer(made, item.details))
            except ApiError as error:
                return BatchItem(error=error.body())

        async def answer_all() -> list[BatchItem]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(item)) for item in body.requests]
            return [task.result() for task in tasks]

        return BatchResponse(answers=await while_connected(http, answer_all()))

    return routes


def operator_routes(dispatcher: Dispatcher, scrape: Scrape) -> APIRouter:
    """Return `/healthz`, `/readyz` and `/metrics`."""
    routes = APIRouter(tags=["operation"])

    @routes.get("/healthz", response_model=Health, responses={503: ERROR_RESPONSES[503]})
    async def healthz() -> Health:
        """Return 200 if this replica is alive: its decoder makes steps, and its searches end."""
        try:
            dispatcher.service.check()
        except EngineStuckError as error:
            raise api_error(error) from error
        return Health()

    @routes.get("/readyz", response_model=Ready, responses={503: ERROR_RESPONSES[503]})
    async def readyz() -> Ready:
        """Return 200 and the snapshot in service if questions are answered."""
        await healthz()
        return Ready(snapshot=dispatcher.service.snapshot)

    @routes.get("/metrics", response_class=PlainTextResponse, responses={401: ERROR_RESPONSES[401]})
    async def metrics() -> Response:
        """Show the metrics of all replicas in Prometheus's text format; docs/reference/metrics.md explains each."""
        return PlainTextResponse(await scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


async def _events(pieces: AsyncGenerator[str | Answer], details: bool | None) -> AsyncGenerator[str]:
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Answer):
                yield event(from_answer(piece, details).model_dump(), "answer")
            else:
                yield event({"text": piece})
