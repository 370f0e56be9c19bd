"""Requests that are passed to a replica in another process, and which replica gets a prompt.

`ray_app` passes requests on with Ray Serve. Nothing in this file needs Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treeflash.serving.authentication import add_guard
from treeflash.serving.errors import APIError
from treeflash.serving.settings import Settings
from treeflash.serving.streaming import until_disconnect, with_errors

logger = logging.getLogger("treeflash.serving")

MIN_SHARE = 0.1  # the part of a prompt that a replica must have got for its cache to count


class PrefixIndex:
    """The beginnings of the prompts that replicas got, separately for each API key.

    A prompt is cut into blocks of `block` characters. A beginning is known by the hash of its
    blocks, and of more than `max_blocks` beginnings the oldest are forgotten.
    """

    def __init__(self, block: int = 64, max_blocks: int = 1 << 16) -> None:
        self._block = block
        self._max_blocks = max_blocks
        self._replicas: OrderedDict[int, set[Hashable]] = OrderedDict()

    def add(self, request: RelayedRequest, replica: Hashable) -> None:
        # Keys are added in reverse, so that a beginning is never forgotten before its
        # continuations.
        for key in reversed(list(self._keys(request))):
            self._replicas.setdefault(key, set()).add(replica)
            self._replicas.move_to_end(key)
        while len(self._replicas) > self._max_blocks:
            self._replicas.popitem(last=False)

    def find(self, request: RelayedRequest, replicas: Collection[Hashable]) -> set[Hashable]:
        """Find the replicas that got the longest beginning, at least `MIN_SHARE` of the prompt."""
        best: set[Hashable] = set()
        length = 0
        for key in self._keys(request):
            known = self._replicas.get(key, set()).intersection(replicas)
            if not known:
                break
            best, length = known, length + self._block
        return best if length >= MIN_SHARE * len(request.prompt) else set()

    def _keys(self, request: RelayedRequest) -> Iterator[int]:
        """Yield the hashes of the prompt's beginnings of one block, two blocks, ..."""
        key, prompt = hash(request.cache_salt), request.prompt
        for start in range(0, len(prompt) - self._block + 1, self._block):
            key = hash((key, prompt[start : start + self._block]))
            yield key


ResponseHead = tuple[int, list[tuple[bytes, bytes]]]  # status and headers of a response


@dataclass(frozen=True)
class RelayedRequest:
    """A complete request, in plain Python: the ASGI scope has no objects of one process."""

    scope: dict[str, Any]
    body: bytes
    prompt: str
    """The text that the router compares with earlier prompts."""
    cache_salt: str = ""
    """Requests with different salts share no cached states, wherever they run."""

    @classmethod
    async def receive(cls, scope: Scope, receive: Receive) -> RelayedRequest:
        """Read a request; only a POST has a body, which the guard has read already."""
        read = Request({"type": "http"}, receive).body
        body = await read() if scope["method"] == "POST" else b""
        names = ("type", "method", "path", "raw_path", "query_string", "headers", "http_version")
        plain = {name: scope[name] for name in (*names, "scheme", "client", "server")}
        plain |= {"asgi": {"version": "3.0"}, "root_path": ""}
        return cls(plain, body, _prompt(body), scope["state"]["cache_salt"])


def _prompt(body: bytes) -> str:
    """Return the texts of a request, in the order in which they become the prompt; never empty."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return "-"
    names = ("instructions", "system", "messages", "input", "prompt")
    return "\n".join(_texts([fields.get(name) for name in names])) or "-"


def _texts(value: Any, depth: int = 9) -> Iterator[str]:
    if isinstance(value, dict):
        value = [value.get(name) for name in ("role", "content", "text", "output")]
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and depth:
        for item in value:
            yield from _texts(item, depth - 1)


async def response_pieces(
    app: ASGIApp, request: RelayedRequest
) -> AsyncIterator[ResponseHead | bytes]:
    """Yield the status and headers, then the body; abandoning the iteration cancels the answer."""
    pieces: asyncio.Queue[ResponseHead | bytes | None] = asyncio.Queue()
    unread: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        """Return the request. No other message comes, because a disconnect cancels the answer."""
        return unread.pop() if unread else await asyncio.Future[Message]()

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
        task.cancel()


def response_app(head: ResponseHead, body: AsyncIterator[bytes]) -> ASGIApp:
    """Return an application that sends a response, and stops when the client disconnects."""
    status, headers = head
    response = StreamingResponse(body, status)
    response.raw_headers = headers
    return response


def relay_application(
    answer: Callable[[RelayedRequest], Any], lost: type[Exception], settings: Settings
) -> Starlette:
    """Return an application that checks requests as the server does, and passes them to `answer`.

    `answer` returns what `response_pieces` yields, with a method `cancel` that disconnects. `lost`
    is the error of a replica that has ended.
    """
    app = Starlette(routes=[Route("/{path:path}", _Relay(answer, lost))])
    add_guard(app, settings, takes_images=True)  # a replica knows whether its model does
    return app


class _Relay:
    def __init__(self, answer: Callable[[RelayedRequest], Any], lost: type[Exception]) -> None:
        self._answer = answer
        self._lost = lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces = self._answer(await RelayedRequest.receive(scope, receive))
        response: ASGIApp
        try:
            try:
                head = await until_disconnect(anext(pieces), receive)
                body = with_errors(pieces, self._lost, _replica_lost, scope["path"])
                response = response_app(head, body)
            except self._lost as error:
                response = _replica_lost(error).response(scope["path"])
            except APIError as error:
                response = error.response(scope["path"])
            await response(scope, receive, send)
        finally:
            pieces.cancel()


def _replica_lost(error: Exception) -> APIError:
    logger.warning("a replica failed: %s", error)
    return APIError(
        503,
        "the replica that answered has ended; send the request again",
        code="replica_lost",
        headers={"Retry-After": "1"},
    )
