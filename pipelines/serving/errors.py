"""Errors of the HTTP API: all in one JSON shape, each with a code for programs.

The shape is the one that OpenAI's clients read: `{"error": {"code", "message", "type", "param"}}`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from pipelines.serving.fields import explain
from prag_core.errors import DeadlineError, NotFiniteError, OverloadedError, PragError, PromptTooLongError, TurnsError

logger = logging.getLogger(__name__)

# Seconds after which a client may try again, where no better estimate is known.
RETRY_AFTER_S = 1.0

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_BY_STATUS = {
    400: (
        "bad_request",
        "the body is not JSON that can be read: UTF-8, no key twice, numbers of up to 4,000 digits, not too deep",
    ),
    404: ("not_found", "there is no such path; /openapi.json lists them"),
    405: ("method_not_allowed", "this path has another method; /openapi.json lists them"),
}


class ErrorBody(BaseModel):
    """An error: a code for programs, a message for people, and the field that caused it."""

    code: str
    message: str
    type: str
    param: str | None = None


class ErrorResponse(BaseModel):
    """The JSON document of every error."""

    error: ErrorBody


@dataclass(eq=False)
class ApiError(Exception):
    """An error as a client gets it. `retry_after_s` becomes the header Retry-After."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> ErrorBody:
        """Return the error for the JSON document."""
        type = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return ErrorBody(code=self.code, message=self.message, type=type, param=self.param)

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        return ErrorResponse(error=self.body()).model_dump()

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse(self.document(), self.status, headers)


def invalid_field(param: str, problem: str) -> ApiError:
    """Return the error for a field whose value is wrong."""
    return ApiError(422, "invalid_request", f"{param}: {problem}", param)


def check_limit(param: str, value: int, limit: int, unit: str = "") -> None:
    """Check that a field's value, or its length, is within a limit of the server.

    Raises:
        ApiError: when it is not.
    """
    if value > limit:
        raise ApiError(422, "limit_exceeded", f"{param}: at most {limit}{unit}", param)


def api_error(error: BaseException) -> ApiError:
    """Return an error as clients may see it: without any detail of this machine or the store."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OverloadedError):
        return ApiError(503, "overloaded", error.message, retry_after_s=error.retry_after_s)
    if isinstance(error, DeadlineError):
        return ApiError(504, "deadline_exceeded", error.message)
    if isinstance(error, PromptTooLongError):
        return ApiError(422, "prompt_too_long", error.message)
    if isinstance(error, TurnsError):
        return ApiError(422, "invalid_request", f"{error.message}; {error.remedy}", "messages")
    if isinstance(error, NotFiniteError):
        # Not a 503: the same question would fail again.
        logger.error("%s", error)
        return ApiError(500, "not_finite", "the model's output for this question is not finite: ask in another mode")
    if isinstance(error, PragError):
        # Its message may name paths and buckets, so it goes to the log only.
        logger.error("%s", error)
        return ApiError(503, "unavailable", "the service cannot answer now", retry_after_s=RETRY_AFTER_S)
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "internal", "an unexpected error; the server's log has it")


def add_error_handlers(app: FastAPI) -> None:
    """Make an application answer every error in the one shape."""

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        return _by_status(error).response()

    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _first_problem(error, request.headers.get("content-type", "")).response()

    app.add_exception_handler(HTTPException, on_http)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, on_invalid)  # type: ignore[arg-type]
    for kind in (ApiError, PragError, Exception):
        app.add_exception_handler(kind, on_error)


def _by_status(error: HTTPException) -> ApiError:
    """Return our error for one that the web framework raised before a route could."""
    code, message = _BY_STATUS.get(error.status_code, ("bad_request", "the request cannot be read"))
    return ApiError(error.status_code, code, message, headers=error.headers or {})


def _first_problem(error: RequestValidationError, content_type: str) -> ApiError:
    """Return the first problem of a request, without the text that the client sent."""
    found = error.errors()[0]
    if found["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is not JSON: see its character {found['loc'][-1]}")
    if not re.match(r"application/([^;\s]+\+)?json\s*(;|$)", content_type, re.IGNORECASE):
        # A web page of another origin may send any other type without being asked, so none is read.
        return ApiError(415, "not_json", "the body must be JSON, under the header Content-Type: application/json")
    param, problem = explain(found)
    return invalid_field(param, problem) if param else ApiError(422, "invalid_request", f"the body {problem}")
