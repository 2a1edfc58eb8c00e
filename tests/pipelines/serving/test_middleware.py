"""API keys, rate limits and the limit of the body's size."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.serving.api_keys import KeyFile, KeyRing
from pipelines.serving.middleware import LOCAL_CALLER, AuthMiddleware, Caller, RateLimiter, is_loopback, open_keys
from pipelines.serving.openai_api import ChatRequest
from prag_core.config import ServeConfig
from prag_core.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "keys.json"


def test_a_key_is_found_until_it_is_revoked(file: Path) -> None:
    key = KeyFile(file).add("anna", ["staff", "hr"], rate_per_minute=7)
    other = KeyFile(file).add("bob")
    ring = KeyRing(file)
    found = ring.find(key)
    assert found is not None
    assert (found.name, found.access, found.rate_per_minute) == ("anna", ("hr", "staff"), 7)
    # An almost right secret, or that of another key, is wrong.
    swapped = "_".join([*other.split("_")[:2], key.split("_", 2)[2]])
    for wrong in ("", "prag", key[:-1], key + "x", key.upper(), f"x{key}", swapped, "prag__", f"prag_{found.id}_", "é"):
        assert ring.find(wrong) is None
    KeyFile(file).revoke("anna")
    assert ring.find(key) is None
    assert ring.find(other) is not None
    with pytest.raises(ConfigError, match="no valid key is named 'anna'"):
        KeyFile(file).revoke("anna")


def test_the_file_holds_no_secret_and_only_its_owner_may_read_it(file: Path) -> None:
    key = KeyFile(file).add("anna")
    assert key.split("_", 2)[2] not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="there is a key named 'anna'"):
        KeyFile(file).add("anna")
    assert len(KeyFile(file).read()) == 1


@pytest.mark.parametrize("hash", ["", "é"])
def test_a_key_without_a_hash_lets_nobody_in(file: Path, hash: str) -> None:
    key = KeyFile(file).add("anna")
    id = key.split("_")[1]
    document = json.loads(file.read_text())
    document["keys"][0]["hash"] = hash
    file.write_text(json.dumps(document))
    assert [KeyRing(file).find(f"prag_{id}_{secret}") for secret in ("", hash, key.split("_", 2)[2])] == [None] * 3


@pytest.mark.parametrize("text", ["", "no", "[]", '{"keys": 1}', '{"keys": [1]}', '{"keys": [{"id": "a"}]}'])
def test_a_damaged_key_file_refuses_every_key(file: Path, text: str) -> None:
    key = KeyFile(file).add("anna")
    ring = KeyRing(file)
    assert ring.find(key) is not None
    file.write_text(text)
    with pytest.raises(ConfigError, match="not a file of API keys"):
        ring.find(key)
    file.unlink()
    assert ring.find(key) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8", "::ffff:127.0.0.1"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    assert open_keys(ServeConfig(host=host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.5", "example.org", "localhost.example.org", "127.1.x"])
def test_a_public_address_without_keys_is_refused(host: str, file: Path) -> None:
    with pytest.raises(ConfigError, match="open to other machines"):
        open_keys(ServeConfig(host=host))
    with pytest.raises(ConfigError, match="no valid key"):
        open_keys(ServeConfig(host=host, api_keys=str(file)))
    KeyFile(file).add("anna")
    assert open_keys(ServeConfig(host=host, api_keys=str(file))) is not None


def test_a_rate_holds_over_time_and_over_replicas() -> None:
    now = 0.0
    limiter = RateLimiter(lambda: now)
    caller = Caller("anna", rate_per_minute=60)  # one a second, ten at once
    assert [limiter.take(caller) for _ in range(10)] == [0.0] * 10
    assert limiter.take(caller) == pytest.approx(1.0)
    assert limiter.take(Caller("bob", rate_per_minute=60)) == 0.0
    now = 2.0
    assert [limiter.take(caller) > 0 for _ in range(3)] == [False, False, True]
    # A batch passes when anything is left, counts in full, and is paid off.
    now = 4.0
    assert limiter.take(caller, 12) == 0.0
    now = 13.5
    assert limiter.take(caller) == pytest.approx(1.5)
    now = 15.0
    assert limiter.take(caller) == 0.0
    # Of four replicas each allows a quarter.
    limiter.replicas = 4
    now = 1000.0
    assert sum(limiter.take(caller) == 0 for _ in range(10)) == 2
    assert all(limiter.take(LOCAL_CALLER) == 0 for _ in range(1000))


class Asked:
    """One request through the middleware, with the body in pieces; remembers what came of it."""

    def __init__(self, config: ServeConfig, keys: KeyRing | None = None, **scope: Any) -> None:
        self.middleware = AuthMiddleware(self._app, keys, config)
        self.scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": "/v1/answer", "headers": [(b"host", b"127.0.0.1:8000")],
            "client": ("127.0.0.1", 5), **scope,
        }  # fmt: skip
        self.body: bytes | None = None
        self.caller: Caller | None = None
        self.read = 0
        self.sent: list[dict[str, Any]] = []

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.caller = scope["state"]["caller"]
        self.body = (await receive())["body"]
        assert (await receive())["type"] == "http.disconnect"

    def __call__(self, *pieces: bytes) -> int:
        waiting = list(pieces)

        async def receive() -> dict[str, Any]:
            if not waiting:
                return {"type": "http.disconnect"}
            self.read += 1
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)

        asyncio.run(self.middleware(self.scope, receive, send))
        return self.sent[0]["status"] if self.sent else 0

    @property
    def error(self) -> str:
        return json.loads(self.sent[1]["body"])["error"]["code"]


def test_a_body_is_counted_as_it_arrives() -> None:
    asked = Asked(ServeConfig(max_body_bytes=1000))
    assert asked(b"x" * 600, b"y" * 400) == 0
    assert asked.body == b"x" * 600 + b"y" * 400
    # The header does not count, only the bytes that arrive.
    lying = Asked(ServeConfig(max_body_bytes=1000), headers=[(b"host", b"localhost"), (b"content-length", b"5")])
    assert lying(b"x" * 600, b"y" * 401, *[b"z" * 1000] * 50) == 413
    assert (lying.error, lying.read, lying.body) == ("body_too_large", 2, None)


def test_without_keys_only_this_machine_is_served_under_its_own_name() -> None:
    assert Asked(ServeConfig())(b"{}") == 0
    for scope in (
        {"client": ("10.0.0.9", 5)},
        {"headers": [(b"host", b"attacker.example:8000")]},
        {"headers": []},
    ):
        asked = Asked(ServeConfig(), **scope)
        assert (asked(b"{}"), asked.error, asked.body) == (401, "unauthorized", None)


def test_a_key_decides_access_and_rate_of_the_caller(file: Path) -> None:
    key = KeyFile(file).add("anna", ["hr"])
    ring = KeyRing(file)
    config = ServeConfig(rate_per_minute=30)
    for value in (None, b"", b"Bearer", b"Bearer x", f"Basic {key}".encode(), key.encode()):
        asked = Asked(config, ring, headers=[(b"authorization", value)] if value is not None else [])
        assert (asked(b"{}"), asked.read, asked.body) == (401, 0, None)
        assert (b"www-authenticate", b"Bearer") in asked.sent[0]["headers"]
    # From anywhere, under any name.
    asked = Asked(config, ring, headers=[(b"authorization", f"bearer {key}".encode())], client=("10.0.0.9", 5))
    assert asked(b"{}") == 0
    assert asked.caller is not None
    assert (asked.caller.access, asked.caller.rate_per_minute) == (frozenset({"hr"}), 30)
    # Load balancers need no key; Prometheus does.
    assert Asked(config, ring, path="/readyz", headers=[])(b"") == 0
    assert Asked(config, ring, path="/metrics", headers=[])(b"") == 401


def test_a_key_that_is_revoked_gets_the_answer_that_is_under_way_and_no_other(file: Path) -> None:
    key = KeyFile(file).add("anna")
    ring = KeyRing(file)

    class Revoking(Asked):
        async def _app(self, scope: Any, receive: Any, send: Any) -> None:
            KeyFile(file).revoke("anna")
            await send({"type": "http.response.start", "status": 200, "headers": []})

    headers = [(b"authorization", f"Bearer {key}".encode())]
    assert Revoking(ServeConfig(), ring, headers=headers)(b"{}") == 200
    assert Asked(ServeConfig(), ring, headers=headers)(b"{}") == 401


def test_a_body_that_comes_too_slowly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.serving.middleware.BODY_TIMEOUT_S", 0.05)
    asked, pieces = Asked(ServeConfig()), 0

    async def receive() -> dict[str, Any]:
        nonlocal pieces
        pieces += 1
        await asyncio.sleep(0.02)  # each piece alone is in time
        return {"type": "http.request", "body": b"x", "more_body": pieces < 50}

    async def send(message: dict[str, Any]) -> None:
        asked.sent.append(message)

    asyncio.run(asked.middleware(asked.scope, receive, send))
    assert (asked.sent[0]["status"], asked.error, asked.body) == (408, "body_timeout", None)
    assert pieces < 50


def test_null_means_absent() -> None:
    """OpenAI's clients send null for what they leave out; a limit of a list has nothing to count then."""
    question = {"model": "m", "messages": [{"role": "user", "content": "Why?"}]}
    optional = [name for name, field in ChatRequest.model_fields.items() if field.default is None]
    assert "stop" in optional
    for name in optional:
        assert getattr(ChatRequest.model_validate({**question, name: None}), name) is None
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({**question, "stop": ["a"] * 5})
