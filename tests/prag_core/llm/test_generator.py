from __future__ import annotations

import json
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from prag_core.config import EndpointConfig
from prag_core.errors import GenerationError, PromptTooLongError, UnfinishedReplyError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.generator import Generator, Prompt, TransformersGenerator
from prag_core.llm.openai_generator import OpenAIGenerator
from tests.helpers.generators import replies

SHARED = "A long beginning that all of these texts have in common. "
ENDINGS = ["a", "bc and some more words", "d?", "one more, of middling length", "a"]
KEY = "sk-very-secret-0815"


def plain(*texts: str) -> list[Prompt]:
    return [Prompt(text, chat=False) for text in texts]


# --- the local model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beginning", ["", SHARED])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_gives_the_texts_that_each_prompt_gives_alone(
    tiny: BaseModel, beginning: str, temperature: float
) -> None:
    generator = TransformersGenerator(tiny, max_batch=3)
    prompts = [Prompt(beginning + text, chat=i % 2 == 0) for i, text in enumerate(ENDINGS)]
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "top_k": 20, "seed": 3}
    together = replies(generator, prompts, **settings)
    alone = [replies(generator, [prompt], **settings)[0] for prompt in prompts]
    assert together == alone
    assert len(set(map(str, together))) > 1


def test_greedy_decoding_equals_that_of_transformers(tiny: BaseModel) -> None:
    import torch

    text = SHARED + "x"
    ids = torch.tensor([tiny.tokenizer.encode(text)])
    made = tiny.model.generate(ids, max_new_tokens=10, do_sample=False, attention_mask=torch.ones_like(ids))
    expected = tiny.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    # A second prompt makes the generator share the common beginning.
    got = replies(TransformersGenerator(tiny), plain(text, SHARED + "yz"), max_new_tokens=10)[0]
    assert got == expected


def test_the_seed_decides_the_sample(tiny: BaseModel) -> None:
    generator = TransformersGenerator(tiny)

    def draw(seed: int) -> list[str | GenerationError]:
        return replies(generator, plain("p", "q"), max_new_tokens=12, temperature=1.0, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_generation_ends_at_the_stop_string_the_end_token_and_the_limit(tiny: BaseModel) -> None:
    generator = TransformersGenerator(tiny)
    (text,) = replies(generator, plain("abc"), max_new_tokens=12)
    assert isinstance(text, str)
    stop = text[2:4]
    (stopped,) = replies(generator, [Prompt("abc", chat=False, stop=stop)], max_new_tokens=12)
    assert stopped == text.split(stop)[0]
    (short,) = replies(generator, plain("abc"), max_new_tokens=2)
    assert isinstance(short, str)
    assert text.startswith(short)
    assert len(short) < len(text)
    # The token that comes first is made the end token.
    first = tiny.tokenizer.encode(text)[0]
    tiny.model.generation_config.eos_token_id = first
    assert replies(TransformersGenerator(tiny), plain("abc"), max_new_tokens=12) == [""]


def test_a_prompt_too_long_is_an_error_in_its_place(tiny: BaseModel) -> None:
    results = replies(TransformersGenerator(tiny), plain("a", "b" * 5000), max_new_tokens=4)
    assert isinstance(results[0], str)
    assert isinstance(results[1], PromptTooLongError)
    assert "4096" in str(results[1])
    assert str(pickle.loads(pickle.dumps(results[1]))) == str(results[1])


def test_output_that_is_not_finite_is_an_error_in_its_place(tiny: BaseModel) -> None:
    import torch

    (poisoned,) = tiny.tokenizer.encode("!")
    with torch.no_grad():
        # The output has a table of its own from here on: only prompts with this token come to grief.
        tiny.model.lm_head.weight = torch.nn.Parameter(tiny.model.lm_head.weight.clone(), requires_grad=False)
        tiny.model.get_input_embeddings().weight[poisoned] = float("nan")
    results = replies(TransformersGenerator(tiny), plain("a", "b!"), max_new_tokens=4)
    assert isinstance(results[0], str)
    assert isinstance(results[1], GenerationError)
    assert "not finite" in str(results[1])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_shared_beginning_is_known_and_changes_no_text(tiny: BaseModel, temperature: float) -> None:
    generator = TransformersGenerator(tiny, max_batch=2)
    prompts = plain(*(SHARED + text for text in ENDINGS))
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    together = replies(generator, prompts, **settings)
    _, known = generator._decoder.prefixes.match(tiny.tokenizer.encode(SHARED + "x"))
    assert known == len(SHARED)
    # A new generator knows no beginning.
    assert together == [replies(TransformersGenerator(tiny), [prompt], **settings)[0] for prompt in prompts]


def test_what_breaks_a_step_breaks_all_that_wait_and_nothing_later(tiny: BaseModel) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    generator = TransformersGenerator(tiny, max_batch=2)
    handle = tiny.model.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        replies(generator, plain("a", "b", "c"), max_new_tokens=4)
    handle.remove()
    assert replies(generator, plain("a"), max_new_tokens=4) == replies(
        TransformersGenerator(tiny), plain("a"), max_new_tokens=4
    )


def test_no_prompts_give_no_results(tiny: BaseModel) -> None:
    generator = TransformersGenerator(tiny)
    assert replies(generator, [], max_new_tokens=4) == []
    assert replies(OpenAIGenerator(EndpointConfig()), [], max_new_tokens=4) == []


def test_a_fingerprint_names_the_model(tiny: BaseModel) -> None:
    local: Generator = TransformersGenerator(tiny)
    remote: Generator = OpenAIGenerator(EndpointConfig(model="m", url="http://elsewhere/v1"))
    assert local.fingerprint == tiny.fingerprint
    assert remote.fingerprint == "openai:m"


# --- an endpoint: a real HTTP server that speaks as much of the protocol as a reply needs ------------------------


@dataclass
class Endpoint:
    """The requests that the server received, and its address."""

    url: str
    requests: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)

    def generator(self, concurrency: int = 16, **settings: Any) -> OpenAIGenerator:
        return OpenAIGenerator(
            EndpointConfig(url=self.url, model="tiny", **{"retries": 1, **settings}), concurrency=concurrency
        )


Reply = Callable[[str, int], tuple[int, Any]]


@contextmanager
def serve(reply: Reply) -> Iterator[Endpoint]:
    """Run a server whose reply is a function of the prompt and of how often it was sent."""
    asked: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat = self.path.endswith("/chat/completions")
            text = body["messages"][0]["content"] if chat else body["prompt"]
            endpoint.requests.append((self.path, body, self.headers.get("Authorization", "")))
            asked[text] = asked.get(text, 0) + 1
            status, content = reply(text, asked[text])
            if callable(content):
                status, content = content(body)
            if status == 200 and isinstance(content, str):
                choice = {"message": {"role": "assistant", "content": content}} if chat else {"text": content}
                content = {"choices": [{"index": 0, "finish_reason": "stop", **choice}]}
            data = json.dumps(content).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client has given up waiting

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "test", "code": code}}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_an_endpoint_answers_chat_and_plain_prompts_in_order() -> None:
    with serve(lambda text, _: (200, text.upper())) as endpoint:
        prompts = [Prompt(f"p{i}", chat=i % 2 == 0, stop="\n") for i in range(6)]
        results = replies(endpoint.generator(), prompts, max_new_tokens=7, temperature=0.5, top_k=9, seed=4)
    assert results == [f"P{i}" for i in range(6)]
    by_text = {body.get("prompt") or body["messages"][0]["content"]: body for _, body, _ in endpoint.requests}
    assert {path for path, _, _ in endpoint.requests} == {"/v1/chat/completions", "/v1/completions"}
    assert by_text["p5"] == {
        **{"model": "tiny", "prompt": "p5", "max_tokens": 7},
        **{"temperature": 0.5, "seed": 4, "stop": ["\n"]},
    }
    assert by_text["p0"]["max_tokens"] == 7


def test_no_more_requests_at_once_than_configured() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def reply(text: str, _: int) -> tuple[int, Any]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return 200, text

    with serve(reply) as endpoint:
        replies(endpoint.generator(concurrency=2), [Prompt(str(i)) for i in range(8)], max_new_tokens=4)
    assert most == 2


def test_a_request_to_a_busy_endpoint_is_repeated() -> None:
    with serve(lambda text, n: (429, error("slow down")) if n == 1 else (200, text)) as endpoint:
        assert replies(endpoint.generator(), [Prompt("a")], max_new_tokens=4) == ["a"]
    assert len(endpoint.requests) == 2


def test_retries_are_bounded_and_the_error_has_the_address_the_cause_and_a_remedy() -> None:
    with serve(lambda text, _: (500, error("kaputt")) if text == "bad" else (200, text)) as endpoint:
        good, bad = replies(endpoint.generator(), [Prompt("good"), Prompt("bad")], max_new_tokens=4)
    assert good == "good"
    assert isinstance(bad, GenerationError)
    assert len(endpoint.requests) == 3
    for part in (endpoint.url, "'tiny'", "kaputt", "augment.endpoint.retries"):
        assert part in str(bad)


def test_a_slow_reply_times_out() -> None:
    def reply(text: str, _: int) -> tuple[int, Any]:
        time.sleep(1.0 if text == "slow" else 0)
        return 200, text

    with serve(reply) as endpoint:
        generator = endpoint.generator(timeout_s=0.3, retries=0)
        slow, fast = replies(generator, [Prompt("slow"), Prompt("fast")], max_new_tokens=4)
    assert fast == "fast"
    assert isinstance(slow, GenerationError)
    assert "timeout_s" in str(slow)


def test_one_bad_prompt_does_not_lose_the_others() -> None:
    def reply(text: str, _: int) -> tuple[int, Any]:
        if text == "bad":
            return 400, error("forbidden words")
        if text == "long":
            return 400, error("too many tokens", "context_length_exceeded")
        return 200, [] if text == "odd" else text

    with serve(reply) as endpoint:
        prompts = [Prompt(text) for text in ("a", "bad", "long", "odd", "b")]
        first, bad, long, odd, last = replies(endpoint.generator(), prompts, max_new_tokens=4)
    assert (first, last) == ("a", "b")
    assert isinstance(bad, GenerationError)
    assert "forbidden words" in str(bad)
    assert isinstance(long, PromptTooLongError)
    assert isinstance(odd, GenerationError)
    assert len(endpoint.requests) == 5, "a bad request is not sent again"


@pytest.mark.parametrize(("status", "hint"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "model")])
def test_an_error_of_the_whole_endpoint_is_raised_at_once(status: int, hint: str) -> None:
    with serve(lambda *_: (status, error(f"no: {KEY}"))) as endpoint, pytest.raises(GenerationError) as caught:
        replies(endpoint.generator(), [Prompt("a"), Prompt("b")], max_new_tokens=4)
    assert hint in str(caught.value)
    assert endpoint.url in str(caught.value)


def test_an_unreachable_endpoint_is_raised() -> None:
    with serve(lambda text, _: (200, text)) as endpoint:
        pass
    with pytest.raises(GenerationError) as caught:
        replies(endpoint.generator(retries=0), [Prompt("a")], max_new_tokens=4)
    assert endpoint.url in str(caught.value)
    assert "start the server" in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 500])
def test_the_key_is_sent_and_never_in_an_error(status: int) -> None:
    # Some servers echo the key that they refuse; here where the message is cut, too.
    with serve(lambda *_: (status, error("x" * 430 + KEY * 9))) as endpoint:
        try:
            (failed,) = replies(endpoint.generator(retries=0), [Prompt("a")], max_new_tokens=4)
        except GenerationError as raised:
            failed = raised
    assert isinstance(failed, GenerationError)
    text = "".join(traceback.format_exception(failed)) + repr(failed)
    assert "[key]" in text
    assert "sk-" not in text
    assert endpoint.requests[0][2] == f"Bearer {KEY}"


def test_a_local_server_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with serve(lambda text, _: (200, text)) as endpoint:
        assert replies(endpoint.generator(), [Prompt("a")], max_new_tokens=4) == ["a"]
    assert endpoint.requests[0][2] == "Bearer unused"


def refusing(*names: str, words: str = "Unsupported parameter: '{}' is not supported with this model.") -> Any:
    """Return a reply of an endpoint that refuses these settings, one after the other."""

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        for name in names:
            if name in body:
                return 400, error(words.format(name))
        return 200, {"choices": [{"message": {"content": "fine"}, "text": "fine", "finish_reason": "stop"}]}

    return lambda *_: (200, reply)


@pytest.mark.parametrize(
    "words",
    [
        "Unsupported parameter: '{}' is not supported with this model. Use 'max_completion_tokens' instead.",
        "Unrecognized request argument supplied: {}",
        "[{{'type': 'extra_forbidden', 'loc': ('body', '{}'), 'msg': 'Extra inputs are not permitted'}}]",
    ],
)
def test_a_setting_that_the_endpoint_refuses_is_left_out_from_then_on(words: str) -> None:
    refused = ("max_tokens", "chat_template_kwargs", "temperature", "seed")
    with serve(refusing(*refused, words=words)) as endpoint:
        generator = endpoint.generator(concurrency=4)
        prompts = [Prompt(str(i), stop="\n") for i in range(6)]
        assert replies(generator, prompts, max_new_tokens=7) == ["fine"] * 6
        needed = len(endpoint.requests)
        assert replies(generator, prompts[:1], max_new_tokens=7) == ["fine"]
    assert len(endpoint.requests) == needed + 1
    body = endpoint.requests[-1][1]
    assert body["max_completion_tokens"] == 7
    assert set(body) == {"model", "messages", "stop", "max_completion_tokens"}


def test_endpoints_are_asked_not_to_let_the_model_reason() -> None:
    with serve(lambda text, _: (200, text)) as endpoint:
        replies(endpoint.generator(), [Prompt("a"), Prompt("b", chat=False)], max_new_tokens=4)
    bodies = {path: body for path, body, _ in endpoint.requests}
    assert bodies["/v1/chat/completions"]["chat_template_kwargs"]["enable_thinking"] is False
    assert "chat_template_kwargs" not in bodies["/v1/completions"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("max_completion_tokens", "'max_completion_tokens' is not supported"), ("seed", "a word of seed is not allowed")],
)
def test_what_can_not_be_left_out_is_an_error(name: str, words: str) -> None:
    with serve(refusing("max_tokens", name) if "max" in name else lambda *_: (400, error(words))) as endpoint:
        (failed,) = replies(endpoint.generator(), [Prompt("a")], max_new_tokens=4)
    assert isinstance(failed, GenerationError)
    assert "refuses this prompt" in str(failed)
    assert len(endpoint.requests) == (2 if "max" in name else 1)


def test_a_context_that_is_too_short_is_no_refused_setting() -> None:
    words = "'max_tokens' is too large: 9. This model's maximum context length is 8 tokens, more is not supported."
    with serve(lambda *_: (400, error(words))) as endpoint:
        (failed,) = replies(endpoint.generator(), [Prompt("a")], max_new_tokens=9)
    assert isinstance(failed, PromptTooLongError)
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("choice", "kind", "message"),
    [
        ({"message": {"content": None}, "finish_reason": "stop"}, GenerationError, "no content"),
        ({"message": {"content": " \n"}, "finish_reason": "stop"}, GenerationError, "no content"),
        ({"message": {"content": None, "refusal": "I must not"}}, GenerationError, "I must not"),
        ({"message": {}, "finish_reason": "content_filter"}, GenerationError, "content_filter"),
        ({"message": {"content": None, "reasoning_content": "[{}]"}, "finish_reason": "length"}, None, "4 tokens"),
        ({"message": {"content": "", "reasoning": "[{}]"}, "finish_reason": "length"}, None, "reasoning"),
        ({"text": None}, GenerationError, "no text"),
        ({"message": None}, GenerationError, "protocol"),
        ({"message": {"content": {"a": 1}}}, GenerationError, "protocol"),
    ],
)
def test_a_reply_without_content_is_no_answer(choice: dict[str, Any], kind: Any, message: str) -> None:
    """So the next run asks again, where an empty text would be the passage's last word."""
    with serve(lambda *_: (200, {"choices": [choice]})) as endpoint:
        prompt = Prompt("a", chat="text" not in choice)
        (failed,) = replies(endpoint.generator(), [prompt], max_new_tokens=4)
    assert type(failed) is (kind or UnfinishedReplyError)
    assert message in str(failed)


def test_reasoning_in_a_field_or_a_part_of_its_own_is_left_out() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "no"}]}, {"type": "text", "text": "yes"}]
    for message in ({"content": "yes", "reasoning_content": "no"}, {"content": parts}):
        with serve(lambda *_, m=message: (200, {"choices": [{"message": m, "finish_reason": "stop"}]})) as endpoint:
            assert replies(endpoint.generator(), [Prompt("a")], max_new_tokens=4) == ["yes"]


def test_a_stop_that_the_endpoint_ignores_ends_the_text() -> None:
    with serve(lambda *_: (200, "a\ud83d?\nb")) as endpoint:
        prompts = [Prompt("p", chat=False, stop="\n"), Prompt("q", stop="\n")]
        assert replies(endpoint.generator(), prompts, max_new_tokens=4) == ["a\ufffd?", "a\ufffd?"]
