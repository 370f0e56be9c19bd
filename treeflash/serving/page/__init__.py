"""The page at `/`, which shows the method: static files, without external resources."""

from __future__ import annotations

from importlib import resources
from pathlib import PurePath

from fastapi import FastAPI, Response

PAGE_FILES = (
    "index.html",
    "page.css",
    "chat.js",
    "images.js",
    "markdown.js",
    "stream.js",
    "tree.js",
)
VENDORED = ("vendor/marked.js", "vendor/purify.js")
"""Of npm: marked 18.2.1 (MIT) and DOMPurify 3.5.0 (Apache 2.0), whose licences are beside them."""
PATHS = {"/" if name == "index.html" else f"/{name}": name for name in PAGE_FILES + VENDORED}
"""The file at each path."""
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
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

    def add(path: str, name: str) -> None:
        content = resources.files(__name__).joinpath(name).read_bytes()
        kind = TYPES[PurePath(name).suffix]

        @app.get(path, include_in_schema=False)
        async def file() -> Response:
            return Response(content, headers=HEADERS, media_type=kind)

    for path, name in PATHS.items():
        add(path, name)
