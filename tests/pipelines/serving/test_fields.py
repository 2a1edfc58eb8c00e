"""What is said of a body that is wrong: our words, the field as the caller wrote it, and what to write instead."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError

from pipelines.serving.errors import add_error_handlers
from pipelines.serving.fields import PROBLEMS, explain
from pipelines.serving.middleware import LOCAL_CALLER
from pipelines.serving.openai_api import ChatRequest, PragOptions, _to_request
from pipelines.serving.schemas import AnswerRequest, BatchRequest, to_request
from prag_core.config import Config
from prag_core.config_file import parse_config

CHAT = {"model": "m:prag", "messages": [{"role": "user", "content": "Who?"}]}
# One value of each kind that JSON has, and values beyond each limit.
WRONG: list[Any] = [
    None, True, 0, -1, 3, 2.5, 1e999, math.nan, 10**30, -(10**30), "", "x", "\ud800", "x" * 5_000, [], ["x"], [None],
    [""], ["x" * 200], ["x"] * 5, ["\ud800"], [[]], {}, {"a": 1}, [{}], [{"type": "text"}],
    [{"type": "text", "text": 1}],
    [{"type": "image_url", "text": "x"}], [{"role": "user"}], [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": 3}], [{"role": "user", "content": ["x"]}], [{"role": "user", "content": "\ud800"}],
    [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], [{"question": 1}], {"topk": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def config() -> Config:
    return parse_config({"store": "none", "corpus": {"path": "none.jsonl"}})


def problem_of(model: type[BaseModel], body: Any) -> tuple[str, str]:
    """The field and the problem of a body that is wrong."""
    with pytest.raises(ValidationError) as raised:
        model.model_validate(body)
    return in_body(raised.value)[0]


def in_body(error: ValidationError) -> list[tuple[str, str]]:
    """Explain the errors as the web framework gives them for a request's body."""
    return [explain({**found, "loc": ("body", *found["loc"])}) for found in error.errors()]


def refused(config: Config, body: Any) -> tuple[str | None, str]:
    """The field and the message of a chat or a question that is beyond a limit."""
    try:
        if "messages" in body:
            _to_request(ChatRequest.model_validate(body), "prag", config, LOCAL_CALLER)
        else:
            to_request(AnswerRequest.model_validate(body), config, None)
    except Exception as error:
        return error.param, error.message  # type: ignore[attr-defined]
    raise AssertionError("it is accepted")


@pytest.mark.parametrize(
    ("model", "right"),
    [(AnswerRequest, {"question": "Who?"}), (ChatRequest, CHAT), (BatchRequest, {}), (PragOptions, {})],
)
def test_each_error_that_a_body_can_raise_has_our_words(model: type[BaseModel], right: dict[str, Any]) -> None:
    bodies: list[Any] = [*WRONG, *({**right, field: value} for field in model.model_fields for value in WRONG)]
    seen: set[str] = set()
    for body in bodies:
        try:
            model.model_validate(body)
        except ValidationError as error:
            for found in error.errors():
                seen.add(found["type"])
                param, problem = explain(found)
                assert found["type"] in PROBLEMS, found
                assert not any(mark in param + problem for mark in ("<", "[", "function", "Input", "valid", "{min")), (
                    found
                )
    assert len(seen) > 5
    assert seen - PROBLEMS.keys() == set()


@pytest.mark.parametrize(
    ("model", "body", "field", "said"),
    [
        (AnswerRequest, {"question": "a", "topk": 1}, "topk", "did you mean top_k?"),
        (AnswerRequest, {"question": "a", "Mode": "rag"}, "Mode", "did you mean mode?"),
        (AnswerRequest, {"question": "a", "max_new_tokens": 5}, "max_new_tokens", "did you mean max_tokens?"),
        (AnswerRequest, {"question": "a", "adapter": "/etc"}, "adapter", "known are question, mode, "),
        (AnswerRequest, {"question": "a", "k" * 10**6: 1}, "k" * 100, "is not known"),
        (AnswerRequest, {"question": "a", "top_k\ud800": 1}, "top_k?", "did you mean top_k?"),
        (BatchRequest, {"requests": [{"question": "a", "topk": 1}]}, "requests.0.topk", "did you mean top_k?"),
        (ChatRequest, {**CHAT, "prag": {"topk": 1}}, "prag.topk", "did you mean top_k?"),
        (ChatRequest, {**CHAT, "temprature": 1}, "temprature", "did you mean temperature?"),
        (ChatRequest, {**CHAT, "top_k": 1}, "top_k", 'belongs into prag, as in "prag": {"top_k": …}'),
        (ChatRequest, {**CHAT, "strength": 1}, "strength", "belongs into prag"),
        (ChatRequest, {**CHAT, "mode": "rag"}, "mode", "the model's name chooses the mode"),
        (ChatRequest, {**CHAT, "functions": [{"name": "f"}]}, "functions", "is not supported here; leave it out"),
        (ChatRequest, {**CHAT, "function_call": {"name": "f"}}, "function_call", "is not supported here"),
        (ChatRequest, {**CHAT, "tools": [{"type": "function"}]}, "tools", "is not supported here"),
        (ChatRequest, {**CHAT, "tool_choice": "required"}, "tool_choice", 'leave it out, or send "none"'),
        (ChatRequest, {**CHAT, "n": 2}, "n", "leave it out, or send 1"),
        (ChatRequest, {**CHAT, "n": True}, "n", "is not supported here"),
        (ChatRequest, {**CHAT, "logprobs": True}, "logprobs", "leave it out, or send false"),
        (ChatRequest, {**CHAT, "presence_penalty": 0.5}, "presence_penalty", "is not supported here"),
        (ChatRequest, {**CHAT, "logit_bias": {"5": 100}}, "logit_bias", "is not supported here"),
        (ChatRequest, {**CHAT, "response_format": {"type": "json_object"}}, "response_format", "is not supported here"),
        (ChatRequest, {**CHAT, "stop": "x" * 101}, "stop", "at most 100 characters"),
        (ChatRequest, {**CHAT, "stop": ["a", ""]}, "stop.1", "must not be empty"),
        (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "half a"),
        (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": 3}]}, "messages.0.content", "must be a text"),
        (
            ChatRequest,
            {**CHAT, "messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}]},
            "messages.0.tool_calls",
            "is not supported here",
        ),
    ],
)
def test_a_field_that_would_be_dropped_is_named(model: type[BaseModel], body: Any, field: str, said: str) -> None:
    found, problem = problem_of(model, body)
    assert found == field
    assert said in problem


def test_what_openais_clients_send_without_effect_is_taken() -> None:
    sent = {
        "user": "u", "metadata": {}, "store": False, "service_tier": "auto", "parallel_tool_calls": True, "n": 1,
        "logprobs": False, "tools": None, "tool_choice": "auto", "functions": [], "presence_penalty": 0,
        "frequency_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}, "modalities": ["text"],
        "stop": None, "seed": None, "temperature": None, "stream": None, "stream_options": None, "prag": None,
    }  # fmt: skip
    turn = {
        "role": "assistant",
        "content": "Mora.",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "name": "b",
    }
    body = ChatRequest.model_validate({**CHAT, **sent, "messages": [turn, {"role": "user", "content": "Who?"}]})
    assert body.messages[0].text == "Mora."
    assert body.prag is None


def test_null_is_as_absent(config: Config) -> None:
    nulls = {name: None for name in AnswerRequest.model_fields if name != "question"}
    body = AnswerRequest.model_validate({"question": "Who?", **nulls})
    assert to_request(body, config, None) == to_request(AnswerRequest(question="Who?"), config, None)
    chat = ChatRequest.model_validate({**CHAT, "prag": dict.fromkeys(PragOptions.model_fields)})
    plain = ChatRequest.model_validate(CHAT)
    assert _to_request(chat, "prag", config, LOCAL_CALLER) == _to_request(plain, "prag", config, LOCAL_CALLER)


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({**CHAT, "max_completion_tokens": 9999}, "max_completion_tokens", "max_completion_tokens: at most 256"),
        ({**CHAT, "max_tokens": 9999}, "max_tokens", "max_tokens: at most 256"),
        ({**CHAT, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "give one of them"),
        ({**CHAT, "prag": {"top_k": 99}}, "prag.top_k", "prag.top_k: at most 10"),
        ({**CHAT, "messages": [{"role": "user", "content": "\u200b"}]}, "messages", "messages: the last one is blank"),
        ({"question": "\u200b"}, "question", "question: is blank"),
        ({"question": " \u2060\ufeff\x00\x1b\n"}, "question", "question: is blank"),
        ({"question": "\u0301\ufe0f"}, "question", "question: is blank"),
        ({"question": "\u3164"}, "question", "question: is blank"),
        ({"question": "x" * 4001}, "question", "question: at most 4000 characters"),
    ],
)
def test_a_limit_names_the_field_that_the_caller_wrote(config: Config, body: Any, field: str, said: str) -> None:
    found, message = refused(config, body)
    assert found == field
    assert said in message


@pytest.mark.parametrize(
    ("sent", "status", "code", "said"),
    [
        ({"content": b'{"question": "a"}'}, 415, "not_json", "Content-Type: application/json"),
        ({"data": {"question": "a"}}, 415, "not_json", "Content-Type: application/json"),
        ({"content": b"{}", "headers": {"content-type": "text/json5"}}, 415, "not_json", "Content-Type"),
        ({"json": 3}, 422, "invalid_request", "the body must be an object"),
        ({"content": b"", "headers": {"content-type": "application/json"}}, 422, "invalid_request", "is missing"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "invalid_json", "character 1"),
        ({"content": b"\xff", "headers": {"content-type": "application/json"}}, 400, "bad_request", "not JSON"),
        ({"json": {}}, 422, "invalid_request", "question: is missing"),
        ({"json": {"question": "a"}}, 200, "", ""),
        ({"content": b'{"question": "a"}', "headers": {"content-type": "application/vnd.x+json"}}, 200, "", ""),
        (
            {"content": b'{"question": "a"}', "headers": {"content-type": "application/json; charset=utf-8"}},
            200,
            "",
            "",
        ),
    ],
)
def test_a_body_that_cannot_be_read_has_our_words(sent: dict[str, Any], status: int, code: str, said: str) -> None:
    app = FastAPI()
    add_error_handlers(app)

    @app.post("/ask")
    async def ask(body: AnswerRequest) -> None:
        pass

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.post("/ask", **sent)

    response = asyncio.run(send())
    assert response.status_code == status
    if status != 200:
        error = response.json()["error"]
        assert error["code"] == code
        assert said in error["message"]
