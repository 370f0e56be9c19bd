"""The page at `/`, which shows the method: static files, without external resources."""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI, Response

FILES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "chat.js": "text/javascript",
    "stream.js": "text/javascript",
    "tree.js": "text/javascript",
    "markdown.js": "text/javascript",
}
VENDORED = {"vendor/marked.js": "text/javascript", "vendor/purify.js": "text/javascript"}
"""Of npm: marked 18.2.1 (MIT) and DOMPurify 3.5.0 (Apache 2.0), whose licences are beside them."""
PATHS = frozenset({"/", *(f"/{name}" for name in FILES | VENDORED)} - {"/index.html"})
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_routes(app: FastAPI) -> None:

    def add(name: str, kind: str, path: str) -> None:
        content = resources.files(__name__).joinpath(name).read_bytes()

        # Some clients, such as Claude Code, send HEAD to see whether the server is there.
        @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
        async def file() -> Response:
            return Response(content, headers=HEADERS, media_type=kind)

    for name, kind in (FILES | VENDORED).items():
        add(name, kind, "/" if name == "index.html" else f"/{name}")
