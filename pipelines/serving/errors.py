"""Every error of the HTTP API in one JSON shape, with a code that programs can tell apart.

The shape is the one that OpenAI's clients read: `{"error": {"code", "message", "type", "param"}}`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from prag_core.errors import DeadlineError, NotFiniteError, OverloadedError, PragError, PromptTooLongError, TurnsError

logger = logging.getLogger(__name__)

# How long a client may wait before it tries again, when nobody knows better.
RETRY_AFTER_S = 1.0

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}


class ErrorBody(BaseModel):
    """What went wrong: a code for programs, a message for people, and the field that is to blame."""

    code: str
    message: str
    type: str
    param: str | None = None


class ErrorResponse(BaseModel):
    """The one shape of every error."""

    error: ErrorBody


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error: its HTTP status, its code, and what the client should know."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> ErrorBody:
        """Return what the client is told."""
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


def api_error(error: BaseException) -> ApiError:
    """Return what a client is told about an error: nothing about this machine or the store."""
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
        # Asked again, it would end alike: no 503.
        logger.error("%s", error)
        return ApiError(500, "not_finite", "the model's output for this question is not finite: ask in another mode")
    if isinstance(error, PragError):
        # Its message may name paths and buckets, which are for the log.
        logger.error("%s", error)
        return ApiError(503, "unavailable", "the service cannot answer now", retry_after_s=RETRY_AFTER_S)
    logger.error("an error that should not happen", exc_info=error)
    return ApiError(500, "internal", "an error that should not happen; it is in the server's log")


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of an application answer in the one shape."""

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "bad_request" if error.status_code < 500 else "server_error")
        return ApiError(error.status_code, code, str(error.detail), headers=error.headers or {}).response()

    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error).response()

    app.add_exception_handler(HTTPException, on_http)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, on_invalid)  # type: ignore[arg-type]
    for kind in (ApiError, PragError, Exception):
        app.add_exception_handler(kind, on_error)


def _invalid(error: RequestValidationError) -> ApiError:
    """Return the first thing that is wrong with a request; what the client sent is not repeated."""
    found = error.errors()[0]
    if found["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is not JSON: {found['ctx']['error']}")
    # The first part says where the field stands (body, query); a body as a whole has no field.
    param = ".".join(str(part) for part in found["loc"][1:])[:200].encode("utf-8", "replace").decode()
    return ApiError(422, "invalid_request", f"{param or 'the body'}: {found['msg']}", param or None)
