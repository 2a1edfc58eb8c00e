"""Authentication, rate limits and the limit of the body's size, before a request reaches a route."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.api_keys import KeyRing
from pipelines.serving.errors import ApiError, api_error
from pipelines.serving.page import DOCS_PATHS, PAGE_PATHS
from prag_core.config import ServeConfig
from prag_core.errors import ConfigError, PragError

# A key may use this many seconds of its rate at once.
BURST_S = 10.0
# A client that sends its body more slowly would occupy a place for nothing.
BODY_TIMEOUT_S = 10.0
# Load balancers and browsers need these before they have a key.
PUBLIC_PATHS = PAGE_PATHS | DOCS_PATHS | {"/healthz", "/readyz", "/openapi.json"}


@dataclass(frozen=True)
class Caller:
    """An authenticated client: the key's id, its access tags (None: all), and its rate (None: no limit)."""

    id: str
    access: frozenset[str] | None = None
    rate_per_minute: int | None = None


LOCAL_CALLER = Caller("local")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    name = host.strip().strip("[]").lower()
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def open_keys(config: ServeConfig) -> KeyRing | None:
    """Return the keys that callers must present, or None for a loopback address without keys.

    Raises:
        ConfigError: when the address is public and there are no keys, or the file of keys cannot be read.
    """
    if config.api_keys is None:
        if is_loopback(config.host):
            return None
        raise ConfigError(
            f"serve.host = {config.host!r} is open to other machines, and serve.api_keys names no file of keys",
            "make one with `prag keys add NAME --file keys.json` and set serve.api_keys, or listen on 127.0.0.1",
        )
    keys = KeyRing(Path(config.api_keys))
    if not keys.valid():
        raise ConfigError(
            f"serve.api_keys = {config.api_keys!r} holds no valid key, so no request could pass",
            f"add one with `prag keys add NAME --file {config.api_keys}`",
        )
    return keys


class RateLimiter:
    """A token bucket for each caller, with one token a question, filled at the caller's rate.

    A request passes while at least one token is left, and may take more than are left. So a batch counts in full, but
    is never impossible. With `replicas` servers behind one address, each allows its share of the rate.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.replicas = 1
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, caller: Caller, questions: int = 1) -> float:
        """Take `questions` tokens from a caller's bucket; return 0, or the seconds to wait when none is left."""
        if caller.rate_per_minute is None:
            return 0.0
        per_second = caller.rate_per_minute / 60 / self.replicas
        capacity = max(1.0, per_second * BURST_S)
        now = self._clock()
        left, then = self._buckets.get(caller.id, (capacity, now))
        left = min(capacity, left + (now - then) * per_second)
        wait = 0.0 if left >= 1 else (1 - left) / per_second
        self._buckets[caller.id] = (left if wait else left - questions, now)
        return wait


class AuthMiddleware:
    """ASGI middleware that authenticates the caller and limits the body, whose bytes it counts as they arrive.

    Routes find the caller as `request.state.caller`. Without keys only this machine is served, whatever address the
    server listens on, and only under a name of this machine: a web page cannot reach the server by a DNS name of its
    own.

    Args:
        app: The application behind it.
        keys: The valid keys; None when none are needed.
        config: The limits.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, config: ServeConfig) -> None:
        self._app = app
        self._keys = keys
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["caller"] = self._caller(scope)
            body = await self._body(receive)
        except (ApiError, PragError) as error:
            await api_error(error).response()(scope, receive, send)
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    def _caller(self, scope: Scope) -> Caller:
        if self._keys is None:
            peer, name = scope.get("client"), Headers(scope=scope).get("host", "")
            if (peer is not None and not is_loopback(peer[0])) or not is_loopback(_without_port(name)):
                raise ApiError(401, "unauthorized", "without API keys, only this machine is served")
            return LOCAL_CALLER
        if scope["path"] in PUBLIC_PATHS:
            return Caller("public", frozenset(), None)
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        key = self._keys.find(token.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise ApiError(
                401,
                "unauthorized",
                "a valid key is needed: Authorization: Bearer prag_…",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return Caller(key.id, frozenset(key.access), key.rate_per_minute or self._config.rate_per_minute)

    async def _body(self, receive: Receive) -> bytes:
        chunks, size = [], 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "disconnected", "the client went away before its body was complete")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self._config.max_body_bytes:
                        raise ApiError(
                            413, "body_too_large", f"the body has more than {self._config.max_body_bytes} bytes"
                        )
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(408, "body_timeout", f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None


def _without_port(name: str) -> str:
    return name.partition("]")[0] if name.startswith("[") else name.partition(":")[0]
