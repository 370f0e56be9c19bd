"""What every request passes first: its key, its size, and the time in which it arrives."""

from __future__ import annotations

import asyncio
import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treeflash.serving import page
from treeflash.serving.errors import APIError
from treeflash.serving.settings import Settings

OPEN = page.PATHS | {"/health"}
"""Paths that need no key."""


class Guard:
    """Middleware that checks the key, and reads the body within its limits.

    It is plain ASGI, because a disconnect must reach the endpoint.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        """Wrap an application."""
        self._app = app
        self._settings = settings
        self._keys = [hashlib.sha256(key.encode()).hexdigest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            salt = self._salt(headers, scope["path"])
            scope.setdefault("state", {})["salt"] = salt
            if scope["method"] == "POST":
                receive = await self._body(headers, receive)
        except APIError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _salt(self, headers: Headers, path: str) -> str:
        """What names the key of a request: texts of different keys share no states."""
        if not self._keys or path in OPEN:
            return ""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(key.encode()).hexdigest()
        # Every key is compared, each in constant time, so that the time says nothing.
        if not sum(hmac.compare_digest(digest, known) for known in self._keys):
            raise APIError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest

    async def _body(self, headers: Headers, receive: Receive) -> Receive:
        """Read the whole body; returns what gives it to the application."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A page of another origin can send other types without asking first.
            raise APIError(415, "the body must be JSON; send Content-Type: application/json")
        limit = int(self._settings.max_body_mb * 2**20)
        body = b""
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise APIError(
                            413, f"the body has more than {limit} bytes, which is the limit"
                        )
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise APIError(
                408,
                f"the body did not arrive within {self._settings.body_timeout:g} seconds",
                headers={"Connection": "close"},
            ) from None
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return replay
