"""Server-sent events whose source is closed when the client goes away."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pipelines.serving.errors import ApiError

# What the OpenAPI document says of one event; `data` is a JSON document.
EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
            "required": ["data"],
        }
    }
}


def event(document: Any, name: str = "") -> str:
    """Return one server-sent event with a JSON document."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """A response that sends events while they are made; an error is the last of them."""

    def __init__(self, first: str, following: AsyncGenerator[str]) -> None:
        super().__init__(_all(first, following), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._source = following

    @classmethod
    async def begin(cls, events: AsyncGenerator[str]) -> EventStream:
        """Wait for the first event: a request that is refused before it gets an error's status.

        Raises:
            ApiError: what the source raised before its first event.
        """
        return cls(await anext(events), events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; then, whatever happened, close their source."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


async def _all(first: str, following: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    try:
        async for text in following:
            yield text
    except ApiError as error:
        yield event(error.document(), "error")
