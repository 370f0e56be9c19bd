"""Requests to an application without a connection, so that a test decides when each piece comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from starlette.datastructures import Headers

from treeflash.serving.relay import relay_application, response_pieces


@dataclass
class Answer:
    """The answer of an application.

    Attributes:
        status: the status; 0 if the application sent none.
        headers: the headers of the response.
        body: the body of the response.
        pieces_read: pieces of the request's body that the application read.
    """

    status: int = 0
    headers: Headers = field(default_factory=Headers)
    body: bytes = b""
    pieces_read: int = 0

    def json(self) -> dict:
        return json.loads(self.body)


def ask(
    app,
    method: str,
    path: str,
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    pieces: Iterable[bytes] = (b"",),
    pause: float = 0.0,
    disconnect: asyncio.Event | None = None,
) -> Answer:
    """Send a request whose body arrives in pieces, each after a pause; a piece may be endless."""
    return asyncio.run(ask_async(app, method, path, headers, pieces, pause, disconnect))


async def ask_async(app, method, path, headers=(), pieces=(b"",), pause=0.0, disconnect=None):
    answer = Answer()
    items = headers.items() if isinstance(headers, Mapping) else headers
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in items],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    left = iter(pieces)
    upcoming = next(left, b"")
    ended = False

    async def receive():
        nonlocal upcoming, ended
        if ended:
            await (disconnect or asyncio.Event()).wait()
            return {"type": "http.disconnect"}
        await asyncio.sleep(pause)
        answer.pieces_read += 1
        piece, upcoming = upcoming, next(left, None)
        ended = upcoming is None
        return {"type": "http.request", "body": piece, "more_body": not ended}

    async def send(message):
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = Headers(raw=message["headers"])
        else:
            answer.body += message.get("body", b"")

    await app(scope, receive, send)
    return answer


class LostReplicaError(Exception):
    """The replica has ended."""


class Pieces:
    """The pieces of a replica's answer, as Ray hands them to the ingress."""

    def __init__(self, pieces) -> None:
        self._pieces = pieces
        self.cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await anext(self._pieces)

    def cancel(self) -> None:
        self.cancelled = True


def ingress(app, settings, relayed: list | None = None):
    """The application in front of replicas, each of which answers with `app`."""

    def answer(request):
        if relayed is not None:
            relayed.append(request)
        return Pieces(response_pieces(app, request))

    return relay_application(answer, LostReplicaError, settings)
