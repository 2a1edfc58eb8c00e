"""The page at `/`: three files, with nothing loaded from other servers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

# Path, file and media type. The page links to the others by relative paths, so a proxy may serve it below a prefix.
_FILES = (
    ("/", "index.html", "text/html"),
    ("/page.css", "page.css", "text/css"),
    ("/page.js", "page.js", "text/javascript"),
)
# These hold no user's data and are served without a key.
PAGE_PATHS = frozenset(path for path, _, _ in _FILES)

_HEADERS = {
    # Only the page's own two files, requests to its own server only, and no frame around it.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """Return the routes of the page's files."""
    routes = APIRouter()
    for path, name, media_type in _FILES:
        content = (resources.files("pipelines.serving") / "static" / name).read_bytes()
        routes.add_api_route(path, _sender(content, media_type), include_in_schema=False, name=name)
    return routes


def _sender(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return send
