"""How answers reach the client: as server-sent events, or at once when all are finished."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from treeflash.serving.completion import Completion
from treeflash.serving.errors import APIError, api_error

logger = logging.getLogger("treeflash.serving")
DONE = format_sse_event(data_str="[DONE]")


def frame(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return format_sse_event(data_str=text, event=event)


class CompletionStream(EventSourceResponse):
    """Streams frames; when the client disconnects, the answers are dropped."""

    def __init__(
        self, completion: Completion, frames: AsyncIterator[bytes], keep_alive: float
    ) -> None:
        """Prepare a response.

        Args:
            completion: is cancelled at the end.
            frames: reads the completion; errors that it raises end the stream with an error.
            keep_alive: seconds without a frame after which a comment is sent.
        """
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_with_keep_alive(_with_errors(frames), keep_alive), headers=headers)
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        with self._completion:
            await super().__call__(scope, receive, send)


async def finish(completion: Completion, request: Request) -> None:
    """Wait for all answers of a request.

    Raises:
        APIError: what ended an answer, or the client has disconnected.
    """
    with completion:
        run = asyncio.ensure_future(completion.run())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({run, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not run.done():
                raise APIError(499, "the client has disconnected")
            run.result()
        except Exception as error:
            raise reported(error) from error
        finally:
            run.cancel()
            gone.cancel()


def reported(error: Exception) -> APIError:
    """What to tell the client; a fault of the program is logged."""
    told = api_error(error)
    if told.code == "internal_error":
        logger.error("a request failed", exc_info=error)
    return told


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _with_errors(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The frames; an error becomes the last one, since the status has been sent already."""
    try:
        async for item in frames:
            yield item
    except Exception as error:
        yield frame(reported(error).body())


async def _with_keep_alive(frames: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    """The frames, and a comment whenever there is none for so long."""
    upcoming: asyncio.Future[bytes] = asyncio.ensure_future(anext(frames))
    try:
        while True:
            await asyncio.wait({upcoming}, timeout=seconds)
            if not upcoming.done():
                yield KEEPALIVE_COMMENT
                continue
            try:
                item = upcoming.result()
            except StopAsyncIteration:
                return
            yield item
            upcoming = asyncio.ensure_future(anext(frames))
    finally:
        upcoming.cancel()
