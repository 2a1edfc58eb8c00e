"""Endpoints whose replies are not those of the protocol: each is an error of its prompt, in the endpoint's words."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from prag_core.config import EndpointConfig
from prag_core.errors import GenerationError, PromptTooLongError
from prag_core.llm.generator import Prompt
from prag_core.llm.openai_generator import OpenAIGenerator
from tests.helpers.generators import replies

YES = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "yes"}}]})


def response(status: int, body: bytes | str) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + data


@contextmanager
def serve(send: Callable[[socket.socket, int], object]) -> Iterator[str]:
    """Run a server that reads each request and then calls `send` with the connection and the request's number."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        number = 0
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            number += 1
            with connection:
                connection.recv(100_000)
                with contextlib.suppress(OSError):  # the client has given up waiting
                    send(connection, number)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def ask(url: str, **settings: Any) -> str | GenerationError:
    config = EndpointConfig(url=url, model="m", **{"retries": 0, **settings})
    return replies(OpenAIGenerator(config), [Prompt("a")], max_new_tokens=4)[0]


def choice(**fields: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "finish_reason": "stop", **fields}]})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "protocol"),
        ("<html>sign in</html>", "protocol"),
        (YES[:30], "protocol"),
        (YES.encode().replace(b"yes", b"\xff"), "protocol"),
        ('{"choices": {"message": {"content": "yes"}}}', "protocol"),
        (choice(message={"content": [{"type": "text"}]}), "protocol"),
        ('{"error": {"message": "overloaded"}}', "overloaded"),
        (choice(message={"content": "The tower is"}, finish_reason="content_filter"), "content_filter"),
    ],
)
def test_a_strange_reply_is_the_error_of_its_prompt(body: bytes | str, words: str) -> None:
    with serve(lambda connection, _: connection.sendall(response(200, body))) as url:
        failed = ask(url)
    assert isinstance(failed, GenerationError)
    assert words in str(failed)


@pytest.mark.parametrize(
    ("body", "words", "kind"),
    [
        ("no such thing", "no such thing", GenerationError),
        ('["no such thing"]', "no such thing", GenerationError),
        ('{"detail": "no such thing"}', "no such thing", GenerationError),
        ('{"error": "context length exceeded"}', "context length", PromptTooLongError),
        ('{"error": {"message": "the request exceeds the available context size"}}', "size", PromptTooLongError),
        (
            '{"error": {"message": "The input token count exceeds the maximum number of tokens"}}',
            "",
            PromptTooLongError,
        ),
        ('{"error": {"message": "prompt is too long: 9 tokens > 8 maximum"}}', "too long", PromptTooLongError),
    ],
)
def test_what_a_refusal_says_is_kept(body: str, words: str, kind: type[GenerationError]) -> None:
    with serve(lambda connection, _: connection.sendall(response(400, body))) as url:
        failed = ask(url)
    assert type(failed) is kind
    assert words in str(failed)


def test_a_refused_setting_is_found_in_fastapis_form_too() -> None:
    """Its items repeat the whole request, of which nothing but the place counts."""
    item = {"loc": ["body", "chat_template_kwargs"], "msg": "Extra inputs are not permitted", "input": '"max_tokens"'}
    refusal = response(422, json.dumps({"detail": [item]}))
    with serve(lambda connection, n: connection.sendall(refusal if n == 1 else response(200, YES))) as url:
        assert ask(url) == "yes"


def test_a_reply_that_comes_in_drops_times_out() -> None:
    def drip(connection: socket.socket, _: int) -> None:
        for byte in response(200, YES):
            connection.sendall(bytes([byte]))
            time.sleep(0.1)

    begun = time.monotonic()
    with serve(drip) as url:
        failed = ask(url, timeout_s=0.5)
        spent = time.monotonic() - begun
    assert isinstance(failed, GenerationError)
    assert "timeout_s" in str(failed)
    assert spent < 5
