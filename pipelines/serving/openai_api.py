"""Routes for OpenAI's clients: an existing program works after a change of its base URL.

The model's name chooses the mode: `<base>:prag`, `<base>:combine`, …. The base model's name alone is the default mode.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import PurePath
from types import MappingProxyType
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from pipelines.serving.dispatcher import Dispatcher, while_connected
from pipelines.serving.errors import ApiError, ErrorResponse, invalid_field
from pipelines.serving.fields import Strict
from pipelines.serving.middleware import Caller
from pipelines.serving.schemas import (
    QUESTION,
    AnswerRequest,
    PassageUse,
    Seed,
    Stop,
    Temperature,
    Text,
    TopP,
    check_length,
    from_answer,
    to_request,
)
from pipelines.serving.sse import EVENTS, EventStream, event
from pipelines.serving.strict_route import StrictRoute
from prag_core.config import Config
from prag_core.inference.question import question_problem
from prag_core.inference.request import Request as AskRequest
from prag_core.prompts import Role
from prag_core.records import MAX_STRENGTH, Answer, AskedMode, MergeRule, Mode

# Fields of OpenAI's protocol that do not change the answer.
_IGNORED = frozenset(
    (
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "reasoning_effort", "verbosity", "parallel_tool_calls",
    )
)  # fmt: skip
# Fields that would change it but are not supported, with the values that ask for nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


_CALLS: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "function_call": (), "audio": ()}


def _case(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


class _Lenient(Strict):
    """A part of a body of OpenAI's protocol. Fields without a meaning here are ignored."""

    model_config = ConfigDict(extra="ignore")


class ContentPart(_Lenient):
    """A part of a message; only text parts are accepted."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Lenient):
    """A turn of the conversation."""

    WITHOUT_EFFECT = MappingProxyType(_CALLS)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("<text>")] | Annotated[list[ContentPart], Tag("<list>")], Discriminator(_case)
    ]

    @property
    def text(self) -> str:
        """The message's text."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(_Lenient):
    """Options of a stream."""

    include_usage: bool | None = None


class PragOptions(Strict):
    """Options of this server only; OpenAI's client sends them as `extra_body={"prag": {…}}`."""

    top_k: int | None = Field(None, ge=1)
    weights: MergeRule | None = None
    strength: float | None = Field(None, gt=0, le=MAX_STRENGTH)
    min_score: float | None = Field(None, ge=0)
    deadline_s: float | None = Field(None, gt=0)


class ChatRequest(Strict):
    """A chat. The last message, by the user, is the question, and the turns before it are its context.

    Fields of OpenAI's protocol that would change the answer but are not supported here (tools, several choices,
    penalties, JSON) are refused, except with a value that asks for nothing. The rest of the protocol is ignored.
    """

    IGNORED = _IGNORED
    WITHOUT_EFFECT = MappingProxyType(_WITHOUT_EFFECT)
    ELSEWHERE = MappingProxyType(
        {
            **{name: f'belongs into prag, as in "prag": {{"{name}": …}}' for name in PragOptions.model_fields},
            "mode": "the model's name chooses the mode, as in <base>:prag",
            "question": "the question is the last one of the messages",
        }
    )

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
    stop: (
        Annotated[
            Annotated[Stop, Tag("<text>")] | Annotated[list[Stop], Field(max_length=4), Tag("<list>")],
            Discriminator(_case),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prag: PragOptions | None = None


class Usage(BaseModel):
    """Token counts under OpenAI's names."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PragExtra(BaseModel):
    """What this server adds to OpenAI's response; `why` says why `auto` chose the mode."""

    mode: Mode
    why: str
    passages: list[PassageUse]
    snapshot: str
    timings_ms: dict[str, float]


class ReplyMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The reply; there is always one."""

    index: int = 0
    message: ReplyMessage
    finish_reason: Literal["stop", "length"]


class ChatResponse(BaseModel):
    """A reply as OpenAI's clients read it, with the passages and times under `prag`."""

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
    """The base model in each mode."""

    object: Literal["list"] = "list"
    data: list[Model]


def base_name(config: Config) -> str:
    """Return the base model's name for clients: only the last part of a path."""
    return PurePath(config.model.name).name


def model_ids(config: Config) -> dict[str, AskedMode]:
    """Return the mode of each model name."""
    base = base_name(config)
    ids: dict[str, AskedMode] = {f"{base}:{mode}": mode for mode in config.serve.modes}
    if config.answer.mode in config.serve.modes:
        ids[base] = config.answer.mode
    return ids


def openai_routes(dispatcher: Dispatcher) -> APIRouter:
    """Return `/v1/chat/completions` and `/v1/models`."""
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 415, 422, 429, 500, 503, 504)
    }
    routes = APIRouter(prefix="/v1", tags=["openai"], route_class=StrictRoute)
    ids = model_ids(dispatcher.config)

    @routes.get("/models", response_model=ModelList, responses={401: errors[401]})
    async def models() -> ModelList:
        """List the base model once for each mode."""
        return ModelList(data=[Model(id=id) for id in ids])

    @routes.get("/models/{id:path}", response_model=Model, responses={401: errors[401], 404: errors[404]})
    async def model(id: str) -> Model:
        """Show one model."""
        _mode_of(id, ids)
        return Model(id=id)

    @routes.post(
        "/chat/completions",
        response_model=ChatResponse,
        responses={200: {"content": EVENTS}, **errors},
    )
    async def chat(body: ChatRequest, http: Request) -> Any:
        """Answer the last message of a chat. With `stream`, the answer comes as chunks, and `[DONE]` ends it."""
        caller: Caller = http.state.caller
        request = _to_request(body, _mode_of(body.model, ids), dispatcher.config, caller)
        deadline_s = body.prag.deadline_s if body.prag else None
        dispatcher.admit(caller)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if not body.stream:
            answer = await while_connected(http, dispatcher.answer("chat", request, deadline_s))
            choice = Choice(message=ReplyMessage(content=answer.text), finish_reason=_finish_reason(answer))
            return ChatResponse(**head, choices=[choice], usage=_usage(answer), prag=_extra(answer))
        pieces = dispatcher.stream("chat", request, deadline_s)
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return await while_connected(http, EventStream.begin(_chunks(head, pieces, usage)))

    return routes


def _mode_of(id: str, ids: dict[str, AskedMode]) -> AskedMode:
    if id not in ids:
        raise ApiError(404, "model_not_found", f"there is no such model; the models are {', '.join(ids)}", "model")
    return ids[id]


def _to_request(body: ChatRequest, mode: AskedMode, config: Config, caller: Caller) -> AskRequest:
    *turns, last = body.messages
    if last.role != "user":
        raise invalid_field("messages", "the last one must be the user's question")
    if problem := question_problem(last.text):
        raise invalid_field("messages", f"the last one {problem}")
    check_length("messages", "".join(message.text for message in body.messages), config.serve)
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise invalid_field("max_tokens", "is not max_completion_tokens; give one of them")
    options = body.prag or PragOptions()
    plain = AnswerRequest(
        question=last.text,
        mode=mode,
        top_k=options.top_k,
        weights=options.weights,
        strength=options.strength,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop,
        min_score=options.min_score,
    )
    history = tuple((_ROLES[turn.role], turn.text) for turn in turns)
    names = {"mode": "model", "question": "messages", "top_k": "prag.top_k"}
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return to_request(plain, config, caller.access, history, names)


async def _chunks(head: dict[str, Any], pieces: AsyncGenerator[str | Answer], with_usage: bool) -> AsyncGenerator[str]:
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, str], finish: str | None = None, **extra: Any) -> str:
        return event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **extra})

    begun = False
    async with aclosing(pieces):
        async for piece in pieces:
            if not begun:
                # Not before the first piece: a question that is refused must get an error's status.
                begun = True
                yield chunk({"role": "assistant", "content": ""})
            if isinstance(piece, Answer):
                yield chunk({}, _finish_reason(piece), prag=_extra(piece).model_dump())
                if with_usage:
                    yield event({**head, "choices": [], "usage": _usage(piece).model_dump()})
            else:
                yield chunk({"content": piece})
    yield "data: [DONE]\n\n"


def _finish_reason(answer: Answer) -> Literal["stop", "length"]:
    return "length" if answer.finish == "length" else "stop"


def _usage(answer: Answer) -> Usage:
    return Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.new_tokens,
        total_tokens=answer.prompt_tokens + answer.new_tokens,
    )


def _extra(answer: Answer) -> PragExtra:
    seen = from_answer(answer)
    return PragExtra(
        mode=seen.mode, why=seen.why, passages=seen.passages, snapshot=seen.snapshot, timings_ms=seen.timings_ms
    )
