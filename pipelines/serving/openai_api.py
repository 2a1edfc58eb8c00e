"""The routes that OpenAI's clients know, so that an existing program works by changing its base URL.

The model's name chooses the mode: `<base>:prag`, `<base>:combine`, …; the base's name alone is the default mode.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import PurePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipelines.serving.dispatcher import Dispatcher, while_connected
from pipelines.serving.errors import ApiError, ErrorResponse
from pipelines.serving.middleware import Caller
from pipelines.serving.schemas import (
    QUESTION,
    AnswerRequest,
    PassageUse,
    Seed,
    Stop,
    Strict,
    Temperature,
    Text,
    TopP,
    check_length,
    from_answer,
    to_request,
)
from pipelines.serving.sse import EVENTS, EventStream, event
from prag_core.config import Config
from prag_core.inference.request import Request as AskRequest
from prag_core.prompts import Role
from prag_core.records import MAX_STRENGTH, Answer, MergeRule, Mode

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class _Lenient(BaseModel):
    """A body of somebody else's protocol: what has no meaning here is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class ContentPart(_Lenient):
    """A part of a message; only texts are understood."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Lenient):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ContentPart]

    @property
    def text(self) -> str:
        """The message's text."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(_Lenient):
    """What a stream has besides its text."""

    include_usage: bool | None = None


class PragOptions(Strict):
    """What only this server understands; OpenAI's client sends it by `extra_body={"prag": {…}}`."""

    top_k: int | None = Field(None, ge=1)
    weights: MergeRule | None = None
    strength: float | None = Field(None, gt=0, le=MAX_STRENGTH)
    min_score: float = Field(0.0, ge=0)
    deadline_s: float | None = Field(None, gt=0)


class ResponseFormat(_Lenient):
    """The only format that is made."""

    type: Literal["text"] = "text"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ChatRequest(_Lenient):
    """A chat: the last message, by the user, is the question; the turns before it are its context."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "smollm2-135m-instruct:prag", "messages": [{"role": "user", "content": QUESTION}]}]
        }
    )

    model: str = Field(min_length=1, max_length=300)
    messages: list[ChatMessage] = Field(min_length=1, max_length=100)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Annotated[Annotated[list[Stop], Field(max_length=4)] | None, BeforeValidator(_as_list)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    tools: list[Any] | None = Field(None, max_length=0, description="There are none.")
    response_format: ResponseFormat | None = None
    prag: PragOptions = PragOptions()


class Usage(BaseModel):
    """Tokens as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PragExtra(BaseModel):
    """What this server says besides."""

    passages: list[PassageUse]
    snapshot: str
    timings_ms: dict[str, float]


class ReplyMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The one reply."""

    index: int = 0
    message: ReplyMessage
    finish_reason: Literal["stop", "length"]


class ChatResponse(BaseModel):
    """A reply as OpenAI's clients read it, and under `prag` what led to it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    prag: PragExtra


class Model(BaseModel):
    """A base model in one mode."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "prag"


class ModelList(BaseModel):
    """The models."""

    object: Literal["list"] = "list"
    data: list[Model]


def base_name(config: Config) -> str:
    """Return the base model's name as clients see it: of a path, only its last part."""
    return PurePath(config.model.name).name


def model_ids(config: Config) -> dict[str, Mode]:
    """Return the mode that each model's name stands for."""
    base = base_name(config)
    ids: dict[str, Mode] = {f"{base}:{mode}": mode for mode in config.serve.modes}
    if config.answer.mode in config.serve.modes:
        ids[base] = config.answer.mode
    return ids


def openai_routes(desk: Dispatcher) -> APIRouter:
    """Return `/v1/chat/completions` and `/v1/models`."""
    wrong: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 422, 429, 500, 503, 504)
    }
    routes = APIRouter(prefix="/v1", tags=["openai"])
    ids = model_ids(desk.config)

    @routes.get("/models", response_model=ModelList, responses={401: wrong[401]})
    async def models() -> ModelList:
        """List the base model, once for each mode."""
        return ModelList(data=[Model(id=id) for id in ids])

    @routes.get("/models/{id:path}", response_model=Model, responses={401: wrong[401], 404: wrong[404]})
    async def model(id: str) -> Model:
        """Show one of them."""
        _mode_of(id, ids)
        return Model(id=id)

    @routes.post(
        "/chat/completions",
        response_model=ChatResponse,
        responses={200: {"content": EVENTS}, **wrong},
    )
    async def chat(body: ChatRequest, http: Request) -> Any:
        """Answer the last message of a chat; with `stream`, as chunks that end with `[DONE]`."""
        caller: Caller = http.state.caller
        request = _to_request(body, _mode_of(body.model, ids), desk.config, caller)
        desk.admit(caller)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if not body.stream:
            answer = await while_connected(http, desk.answer("chat", request, body.prag.deadline_s))
            choice = Choice(message=ReplyMessage(content=answer.text), finish_reason=_reason(answer))
            return ChatResponse(**head, choices=[choice], usage=_usage(answer), prag=_extra(answer))
        pieces = desk.stream("chat", request, body.prag.deadline_s)
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return await while_connected(http, EventStream.begin(_chunks(head, pieces, usage)))

    return routes


def _mode_of(id: str, ids: dict[str, Mode]) -> Mode:
    if id not in ids:
        raise ApiError(404, "model_not_found", f"there is no such model; there are {', '.join(ids)}", "model")
    return ids[id]


def _to_request(body: ChatRequest, mode: Mode, config: Config, caller: Caller) -> AskRequest:
    *turns, last = body.messages
    if last.role != "user":
        raise ApiError(422, "invalid_request", "messages: the last one must be the user's question", "messages")
    check_length("messages", "".join(message.text for message in body.messages), config)
    plain = AnswerRequest(
        question=last.text or " ",
        mode=mode,
        top_k=body.prag.top_k,
        weights=body.prag.weights,
        strength=body.prag.strength,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed or 0,
        stop=body.stop or [],
        min_score=body.prag.min_score,
    )
    history = tuple((_ROLES[turn.role], turn.text) for turn in turns)
    return to_request(plain, config, caller.access, history)


async def _chunks(head: dict[str, Any], pieces: AsyncGenerator[str | Answer], with_usage: bool) -> AsyncGenerator[str]:
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, str], finish: str | None = None, **extra: Any) -> str:
        return event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **extra})

    begun = False
    async with aclosing(pieces):
        async for piece in pieces:
            if not begun:
                # The first chunk comes with the first piece: what is refused before it has an error's status.
                begun = True
                yield chunk({"role": "assistant", "content": ""})
            if isinstance(piece, Answer):
                yield chunk({}, _reason(piece), prag=_extra(piece).model_dump())
                if with_usage:
                    yield event({**head, "choices": [], "usage": _usage(piece).model_dump()})
            else:
                yield chunk({"content": piece})
    yield "data: [DONE]\n\n"


def _reason(answer: Answer) -> Literal["stop", "length"]:
    return "length" if answer.finish == "length" else "stop"


def _usage(answer: Answer) -> Usage:
    return Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.new_tokens,
        total_tokens=answer.prompt_tokens + answer.new_tokens,
    )


def _extra(answer: Answer) -> PragExtra:
    seen = from_answer(answer)
    return PragExtra(passages=seen.passages, snapshot=seen.snapshot, timings_ms=seen.timings_ms)
