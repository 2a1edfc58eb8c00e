"""Server-sent events. Their source is closed when the client disconnects."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pipelines.serving.errors import ApiError

# One event, for the OpenAPI document; `data` is a JSON document.
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
    """Return one server-sent event that carries a JSON document."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """A response that sends events as they are made. If the source fails, the last event is the error."""

    def __init__(self, first: str, following: AsyncGenerator[str]) -> None:
        super().__init__(_all(first, following), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._source = following

    @classmethod
    async def begin(cls, events: AsyncGenerator[str]) -> EventStream:
        """Wait for the first event. If the source fails before it, the response has the error's status.

        Raises:
            ApiError: when the source failed before its first event.
        """
        return cls(await anext(events), events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, and close their source in any case."""
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
