"""Access to the server: the API key, the size and the arrival time of every request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treeflash.serving import page
from treeflash.serving.errors import APIError
from treeflash.serving.settings import Settings

OPEN_PATHS = {*page.PATHS, "/health"}
"""Paths that need no API key."""
JSON = "application/json"
BROWSER_HEADERS = ("origin", "sec-fetch-site")
"""Headers; a browser adds at least one of them to each POST request of a page."""


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def authenticate(headers: Headers, digests: Collection[str]) -> str:
    """Check the API key of a request, in `Authorization: Bearer KEY` or `x-api-key`.

    Returns its digest, which is one of `digests`; raises an APIError if it is missing or wrong.
    """
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    digest = digest_of(key)
    # All keys are compared, each in constant time, so that the time reveals nothing about them.
    if not sum(hmac.compare_digest(digest, valid) for valid in digests):
        raise APIError(
            401,
            "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return digest


def add_guard(app: Starlette, settings: Settings, *, takes_images: bool) -> None:
    """Let an application see only requests with a key, with whole bodies, of allowed origins.

    Bodies may be larger by default where the model `takes_images`.
    """
    app.add_middleware(AuthenticationMiddleware, settings=settings, takes_images=takes_images)
    if settings.cors_origins:
        # The middleware that is added last runs first, so errors have the headers of CORS too.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine alone, by its name or address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with suppress(ValueError):  # it is another name
        address = ip_address(host)
        # A socket of IPv6 names a client's address of IPv4 so, as ::ffff:127.0.0.1.
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    return False


def host_of(origin: str) -> str:
    """Return the name or address in an origin; empty if it has none."""
    with suppress(ValueError):  # the client sent something else
        return urlsplit(origin).hostname or ""
    return ""


def _as_json(headers: Headers, scope: Scope) -> Scope:
    """Return the request with the content type of JSON, whatever type a program has given it.

    An APIError is raised for the request of a browser: a page of another origin can send other
    types without a preflight request.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == JSON:
        return scope
    if any(name in headers for name in BROWSER_HEADERS):
        raise APIError(415, f"the body must be JSON; send Content-Type: {JSON}")
    others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", JSON.encode())]}


class AuthenticationMiddleware:
    """Checks the API key of every request, then reads its body within the limits.

    The digest of the key becomes the request's cache salt, so that sequences of different keys do
    not share cached states. The class is plain ASGI, because a disconnect must reach the endpoint.
    """

    def __init__(self, app: ASGIApp, settings: Settings, *, takes_images: bool = False) -> None:
        self._app = app
        self._max_bytes = settings.body_bytes(takes_images=takes_images)
        self._body_timeout = settings.body_timeout
        self._digests = [digest_of(key) for key in settings.api_keys]
        self._origins = settings.cors_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # a GET that is answered with the headers alone
            scope = {**scope, "method": "GET"}
        try:
            headers, path = Headers(scope=scope), scope["path"]
            needs_key = self._digests and path not in OPEN_PATHS
            cache_salt = authenticate(headers, self._digests) if needs_key else ""
            scope.setdefault("state", {})["cache_salt"] = cache_salt
            if scope["method"] == "POST":
                if not self._digests:
                    self._check_origin(headers.get("origin", ""), scope)
                scope = _as_json(headers, scope)
                receive = await self._read_body(receive)
        except APIError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_origin(self, origin: str, scope: Scope) -> None:
        """Refuse a page of another name than this machine's; raises an APIError.

        A page's owner can let the page's name lead to 127.0.0.1 (DNS rebinding). The browser then
        takes the server for a part of the page, and asks no permission.
        """
        address, _ = scope.get("server") or ("", None)
        if not is_loopback(address) or not origin.startswith(("http://", "https://")):
            return  # other origins are applications, or pages without a name
        if not is_loopback(host_of(origin)) and not {origin, "*"} & {*self._origins}:
            raise APIError(
                403,
                f"pages of {origin} may not use this server; start it with an API key, or with "
                f"--cors-origin {origin}",
            )

    async def _read_body(self, receive: Receive) -> Receive:
        """Read the whole body; returns a callable that hands it to the application."""
        limit, seconds = self._max_bytes, self._body_timeout
        body = bytearray()
        try:
            with suppress(ClientDisconnect):
                async with asyncio.timeout(seconds):
                    async for piece in Request({"type": "http"}, receive).stream():
                        body += piece
                        if len(body) > limit:
                            problem = f"the body has more than {limit} bytes"
                            raise APIError(413, f"{problem}, the limit of this server")
        except TimeoutError:
            raise APIError(
                408,
                f"the body did not arrive within {seconds:g} seconds",
                headers={"Connection": "close"},
            ) from None
        unread: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        return replay
