"""Routes whose requests are read strictly: nothing that a caller wrote is dropped in silence."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from pipelines.serving.errors import invalid_field
from prag_core.data.parsing import parse_json


class _StrictRequest(Request):
    async def json(self) -> Any:
        """Return the body's value; a key that comes twice in an object is an error, as no JSON is."""
        if not hasattr(self, "_json"):
            body = await self.body()
            self._json = parse_json(body.decode(json.detect_encoding(body)))
        return self._json


class StrictRoute(APIRoute):
    """A route that reads the body alone, with each key once. What stands in the address is refused, not dropped."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the function that answers a request."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            for name in request.query_params:
                raise invalid_field(name[:100], "is in the address, where nothing is read; the body has the fields")
            return await handle(_StrictRequest(request.scope, request.receive))

        return answer
