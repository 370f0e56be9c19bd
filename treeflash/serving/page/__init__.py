"""The page at `/`, which shows the method: static files, without external resources."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter, Response

FILES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "chat.js": "text/javascript",
    "stream.js": "text/javascript",
    "tree.js": "text/javascript",
}
PATHS = frozenset({"/", *(f"/{name}" for name in FILES)} - {"/index.html"})
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """The files."""
    routes = APIRouter()

    def serve(name: str, path: str) -> None:
        content = resources.files(__name__).joinpath(name).read_bytes()

        @routes.get(path, include_in_schema=False)
        async def file() -> Response:
            return Response(content, headers=HEADERS, media_type=FILES[name])

    for name in FILES:
        serve(name, "/" if name == "index.html" else f"/{name}")
    return routes
