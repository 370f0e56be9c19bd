"""`/v1/messages` and `/v1/messages/count_tokens`: what Claude Code sends."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse

from treeflash.serving.anthropic_schema import CountTokensRequest, MessagesRequest
from treeflash.serving.blocks import Block, Blocks, Change
from treeflash.serving.conversation import Answers
from treeflash.serving.service import Service
from treeflash.serving.streaming import CompletionStream, finish, frame, reported


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()

    @routes.post("/v1/messages")
    async def messages(body: MessagesRequest, http: HTTPRequest) -> Response:
        service.check_model(body.model)
        conversation = body.conversation(knows_thinking=service.tokenizer.knows_thinking)
        answers = await conversation.start(service, http, body.decoding())
        answer, completion = MessagesAnswer(service, answers), answers.completion
        if body.stream:
            return CompletionStream(completion, answer.frames(), service.settings.keep_alive)
        await finish(completion, http)
        return JSONResponse(answer.whole())

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest) -> dict[str, int]:
        service.check_model(body.model)
        conversation = body.conversation(knows_thinking=service.tokenizer.knows_thinking)
        return {"input_tokens": len(await conversation.encode(service))}

    return routes


class MessagesAnswer:
    """Formats a completion of one answer."""

    def __init__(self, service: Service, answers: Answers) -> None:
        """Give the answer a name."""
        self._tokenizer = service.tokenizer
        self._completion = answers.completion
        (self._parser,) = answers.parsers
        self._blocks = Blocks()
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": service.names[0],
        }

    def whole(self) -> dict[str, Any]:
        """The message, once it is finished."""
        for chunk in self._completion.texts[0].chunks:
            list(self._blocks.add(self._parser.feed(chunk)))
        list(self._blocks.finish())
        content = [_block(block) for block in self._blocks.blocks]
        return {**self._head, "content": content, **self._stop(), "usage": self._usage()}

    async def frames(self) -> AsyncIterator[bytes]:
        """The server-sent events of a stream."""
        begun = False
        try:
            async for event in self._completion:
                if not begun:  # the number of cached tokens is known now
                    begun = True
                    for data in self._begin():
                        yield data
                for change in self._blocks.add(self._parser.feed(event.chunk)):
                    for data in _changed(change):
                        yield data
        except Exception as error:
            yield _frame("error", error=reported(error).anthropic_body()["error"])
            return
        for change in self._blocks.finish():
            for data in _changed(change):
                yield data
        yield _frame("message_delta", delta=self._stop(), usage=self._usage())
        yield _frame("message_stop")

    def _begin(self) -> list[bytes]:
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._head, **empty, "usage": self._usage()}
        return [_frame("message_start", message=message)]

    def _usage(self) -> dict[str, int]:
        counts = self._completion.usage
        return {
            "input_tokens": counts.prompt_tokens - counts.cached_tokens,
            "cache_read_input_tokens": counts.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": counts.completion_tokens,
        }

    def _stop(self) -> dict[str, str | None]:
        """Why the message ended."""
        (text,) = self._completion.texts
        if text.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        ids = [token for chunk in text.chunks for token in chunk.token_ids]
        if ids[-1] not in text.config.stop_token_ids:  # a stop sequence: the first one in the text
            whole = self._tokenizer.decode(ids)
            found = [stop for stop in text.stop if stop in whole]
            return {"stop_reason": "stop_sequence", "stop_sequence": min(found, key=whole.find)}
        return {
            "stop_reason": "tool_use" if self._parser.calls else "end_turn",
            "stop_sequence": None,
        }


def _block(block: Block) -> dict[str, Any]:
    """A part of a message."""
    if block.call is not None:
        head = {"type": "tool_use", "id": block.call.id, "name": block.call.name}
        return {**head, "input": json.loads(block.call.arguments)}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "text", "text": block.text}


def _changed(change: Change) -> list[bytes]:
    """The events of one change."""
    block, at = change.block, {"index": change.block.index}
    if change.event == "close":
        return [_frame("content_block_stop", **at)]
    if change.event == "text":
        thinks = block.kind == "reasoning"
        kind, name = ("thinking_delta", "thinking") if thinks else ("text_delta", "text")
        return [_frame("content_block_delta", **at, delta={"type": kind, name: change.text})]
    empty = _block(block) | ({"input": {}} if block.call is not None else {})
    found = [_frame("content_block_start", **at, content_block=empty)]
    if block.call is not None:
        delta = {"type": "input_json_delta", "partial_json": block.call.arguments}
        found.append(_frame("content_block_delta", **at, delta=delta))
    return found


def _frame(kind: str, **fields: Any) -> bytes:
    return frame({"type": kind, **fields}, kind)
