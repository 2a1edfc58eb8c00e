"""The page at `/` and the API's documentation at `/docs`, with nothing loaded from other servers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

# Path, package, file and media type. The pages link to the others by relative paths, so a proxy may serve them below a
# prefix.
_PAGE = (
    ("/", "pipelines.serving", "index.html", "text/html"),
    ("/page.css", "pipelines.serving", "page.css", "text/css"),
    ("/page.js", "pipelines.serving", "page.js", "text/javascript"),
)
_DOCS = (
    ("/docs", "pipelines.serving", "docs.html", "text/html"),
    ("/docs.js", "pipelines.serving", "docs.js", "text/javascript"),
    ("/swagger-ui.css", "fastapi_offline", "swagger-ui.css", "text/css"),
    ("/swagger-ui-bundle.js", "fastapi_offline", "swagger-ui-bundle.js", "text/javascript"),
)
# These hold no user's data and are served without a key.
PAGE_PATHS = frozenset(path for path, *_ in _PAGE)
DOCS_PATHS = frozenset(path for path, *_ in _DOCS)

_COMMON = "default-src 'none'; script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
_HEADERS = {
    # Only the page's own files, requests to its own server only, and no frame around it.
    "Content-Security-Policy": (
        f"{_COMMON}style-src 'self'; img-src data:; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
# Swagger UI writes styles into its elements.
_DOCS_HEADERS = {
    **_HEADERS,
    "Content-Security-Policy": (
        f"{_COMMON}style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
    ),
}


def page_routes() -> APIRouter:
    """Return the routes of the page's files."""
    return _routes(_PAGE, _HEADERS)


def docs_routes() -> APIRouter:
    """Return the routes of the API's documentation (Swagger UI, from the package fastapi-offline)."""
    return _routes(_DOCS, _DOCS_HEADERS)


def _routes(files: tuple[tuple[str, str, str, str], ...], headers: Mapping[str, str]) -> APIRouter:
    routes = APIRouter()
    for path, package, name, media_type in files:
        content = (resources.files(package) / "static" / name).read_bytes()
        routes.add_api_route(path, _sender(content, media_type, headers), include_in_schema=False, name=name)
    return routes


def _sender(content: bytes, media_type: str, headers: Mapping[str, str]) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=media_type, headers=dict(headers))

    return send
