"""Requests that one process passes to another, which answers them with an ASGI application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Head = tuple[int, list[tuple[bytes, bytes]]]
"""Status and headers of a response."""


@dataclass(frozen=True)
class Relayed:
    """A request, complete, in plain Python.

    Attributes:
        scope: of ASGI, without what belongs to a process.
        body: complete.
        prompt: what routers compare to find the replica that has its beginning in the cache.
    """

    scope: dict[str, Any]
    body: bytes
    prompt: str

    @classmethod
    async def receive(cls, scope: Scope, receive: Receive) -> Relayed:
        """Read a request."""
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                break
        names = ("type", "method", "path", "raw_path", "query_string", "headers", "http_version")
        kept = {name: scope[name] for name in (*names, "scheme", "client", "server")}
        return cls({**kept, "asgi": {"version": "3.0"}, "root_path": ""}, body, _prompt(body))


async def answer(app: ASGIApp, request: Relayed) -> AsyncIterator[Head | bytes]:
    """The status and the headers, then the body piece by piece.

    The application sees a disconnect when the iteration is abandoned.
    """
    pieces: asyncio.Queue[Head | bytes | None] = asyncio.Queue()
    gone = asyncio.Event()
    whole: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if whole:
            return whole.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            pieces.put_nowait((message["status"], list(message["headers"])))
        elif message.get("body"):
            pieces.put_nowait(message["body"])

    async def run() -> None:
        try:
            await app(request.scope, receive, send)
        finally:
            pieces.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
        await task
    finally:
        gone.set()
        if not task.done():
            task.cancel()


def respond(head: Head, body: AsyncIterator[bytes]) -> ASGIApp:
    """An application that gives this response."""
    status, headers = head

    async def response(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})

        async def copy() -> None:
            async for piece in body:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = {asyncio.create_task(copy()), asyncio.create_task(watch())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return response


def _prompt(body: bytes) -> str:
    """The texts of a request, in the order in which they become the prompt; never empty."""
    try:
        found = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        found = {}
    fields = found if isinstance(found, dict) else {}
    parts: list[str] = []
    for name in ("instructions", "system", "messages", "input", "prompt"):
        _collect(fields.get(name), parts)
    return "\n".join(parts) or "-"


def _collect(value: Any, parts: list[str], depth: int = 8) -> None:
    if isinstance(value, str):
        parts.append(value)
    elif isinstance(value, list) and depth:
        for item in value:
            _collect(item, parts, depth - 1)
    elif isinstance(value, dict) and depth:
        for name in ("role", "content", "text", "output"):
            _collect(value.get(name), parts, depth - 1)
