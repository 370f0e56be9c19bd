"""`/v1/responses`, without stored responses: what Codex sends."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse

from treeflash.serving.blocks import Block, Blocks, Change
from treeflash.serving.completion import Usage
from treeflash.serving.conversation import Answers
from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.responses_schema import ResponsesRequest
from treeflash.serving.service import Service
from treeflash.serving.streaming import CompletionStream, finish, frame, reported


def router(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/responses")
    async def responses(body: ResponsesRequest, http: HTTPRequest) -> Response:
        service.check_model(body.model)
        _check_echo(body)
        conversation = body.conversation(knows_thinking=service.tokenizer.knows_thinking)
        answers = await conversation.start(service, http, body.decoding())
        answer, completion = ResponsesAnswer(service, body, answers), answers.completion
        if body.stream:
            return CompletionStream(completion, answer.frames(), service.settings.keep_alive)
        await finish(completion, http)
        return JSONResponse(answer.whole())

    return routes


class ResponsesAnswer:
    """Formats a completion of one answer."""

    def __init__(self, service: Service, body: ResponsesRequest, answers: Answers) -> None:
        """Give the answer a name."""
        self._completion = answers.completion
        (self._parser,) = answers.parsers
        self._blocks = Blocks()
        self._ids: list[str] = []
        self._numbers = count()
        echoed = body.model_dump(
            by_alias=True, exclude={"input", "stream", "stream_options", "client_metadata"}
        )
        self._head: dict[str, Any] = {
            **echoed,
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": service.names[0],
            "error": None,
            "incomplete_details": None,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tool_choice": echoed["tool_choice"] or "auto",
            "tools": echoed["tools"] or [],
            "metadata": body.metadata or {},
            "store": False,
        }

    def whole(self) -> dict[str, Any]:
        """The response, once the answer is finished."""
        for chunk in self._completion.texts[0].chunks:
            self._add([*self._blocks.add(self._parser.feed(chunk))])
        self._add([*self._blocks.finish()])
        return self._finished()

    async def frames(self) -> AsyncIterator[bytes]:
        """The server-sent events of a stream."""
        begun = {**self._head, "status": "in_progress", "output": [], "usage": None}
        yield self._frame("response.created", response=begun)
        yield self._frame("response.in_progress", response=begun)
        try:
            async for event in self._completion:
                for change in self._blocks.add(self._parser.feed(event.chunk)):
                    for item in self._change(change):
                        yield item
        except Exception as error:
            told = reported(error)
            fault = {"code": told.code or "server_error", "message": told.message}
            yield self._frame("error", **fault, param=told.param)
            failed = {**begun, "status": "failed", "error": fault}
            yield self._frame("response.failed", response=failed)
            return
        for change in self._blocks.finish():
            for item in self._change(change):
                yield item
        finished = self._finished()
        yield self._frame(f"response.{finished['status']}", response=finished)

    def _add(self, changes: list[Change]) -> None:
        for change in changes:
            if change.event == "open":
                self._ids.append(_item_id(change.block))

    def _change(self, change: Change) -> list[bytes]:
        """The events of one change."""
        self._add([change])
        block = change.block
        at = {"output_index": block.index}
        inside = {**at, "item_id": self._ids[block.index]}
        part = {**inside, "content_index": 0}
        text = "reasoning_text" if block.kind == "reasoning" else "output_text"
        logs: dict[str, Any] = {} if block.kind == "reasoning" else {"logprobs": []}
        if change.event == "text":
            return [self._frame(f"response.{text}.delta", **part, delta=change.text, **logs)]
        if change.event == "open":
            item = self._item(block, "in_progress")
            item["arguments" if block.call else "content"] = "" if block.call else []
            found = [self._frame("response.output_item.added", **at, item=item)]
            if block.call is None:
                found.append(self._frame("response.content_part.added", **part, part=_part(block)))
                return found
            delta = "response.function_call_arguments.delta"
            return [*found, self._frame(delta, **inside, delta=block.call.arguments)]
        if block.call is not None:
            call = {"name": block.call.name, "arguments": block.call.arguments}
            found = [self._frame("response.function_call_arguments.done", **inside, **call)]
        else:
            found = [
                self._frame(f"response.{text}.done", **part, text=block.text, **logs),
                self._frame("response.content_part.done", **part, part=_part(block)),
            ]
        item = self._item(block, "completed")
        return [*found, self._frame("response.output_item.done", **at, item=item)]

    def _finished(self) -> dict[str, Any]:
        cut = self._completion.texts[0].finish_reason == "length"
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": int(time.time()),
            "output": [self._item(block, "completed") for block in self._blocks.blocks],
            "usage": _usage(self._completion.usage),
        }

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        head = {"id": self._ids[block.index], "status": status}
        if block.call is not None:
            call = {
                "call_id": block.call.id,
                "name": block.call.name,
                "arguments": block.call.arguments,
            }
            return {"type": "function_call", **head, **call}
        if block.kind == "reasoning":
            return {"type": "reasoning", **head, "summary": [], "content": [_part(block)]}
        return {"type": "message", **head, "role": "assistant", "content": [_part(block)]}

    def _frame(self, event: str, **fields: Any) -> bytes:
        data = {"type": event, "sequence_number": next(self._numbers), **fields}
        return frame(data, event)


def _check_echo(body: ResponsesRequest) -> None:
    """Raise an APIError if a response could not repeat the request as JSON."""
    try:
        json.dumps(body.model_dump(), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise APIError(BAD_REQUEST, f"the body is not valid JSON: {error}") from error


def _item_id(block: Block) -> str:
    prefix = {"content": "msg", "reasoning": "rs", "call": "fc"}[block.kind]
    return f"{prefix}_{secrets.token_hex(12)}"


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _usage(counts: Usage) -> dict[str, Any]:
    return {
        "input_tokens": counts.prompt_tokens,
        "input_tokens_details": {"cached_tokens": counts.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": counts.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        "draft_tokens_details": {
            "drafted_tokens": counts.drafted_tokens,
            "accepted_tokens": counts.accepted_tokens,
            "iterations": counts.iterations,
        },
    }
