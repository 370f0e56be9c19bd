"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from pydantic import Field

from treeflash.serving.completion import Completion, Event
from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.log_probs import token_log_probs
from treeflash.serving.schemas import MAX_LOG_PROBS, DecodingSchema, Schema
from treeflash.serving.service import Service, response_id, usage
from treeflash.serving.streaming import DONE, CompletionStream, finish, frame
from treeflash.serving.trees import draft_tree
from treeflash.text.assembler import Assembler
from treeflash.text.options import Options
from treeflash.text.tokenizer import Tokenizer


class TextPart(Schema):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Schema):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def template(self) -> dict[str, Any]:
        """As chat templates read it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


class ChatRequest(DecodingSchema):
    """The body of a request."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOG_PROBS)
    chat_template_kwargs: dict[str, Any] | None = None

    def options(self) -> Options:
        """The decoding options that were given."""
        options = super().options()
        if self.max_completion_tokens is not None:
            if self.max_tokens is not None:
                raise APIError(
                    BAD_REQUEST,
                    "max_tokens and max_completion_tokens mean the same; give one of them",
                    param="max_tokens",
                )
            options["max_tokens"] = self.max_completion_tokens
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(
                BAD_REQUEST, "top_logprobs needs logprobs to be true", param="top_logprobs"
            )
        if self.logprobs:
            options["log_probs"] = self.top_logprobs or 0
        return options


def router(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: HTTPRequest) -> Response:
        service.check_model(body.model)
        messages = [message.template() for message in body.messages]
        prompt_ids = await service.encode_chat(messages, body.chat_template_kwargs or {})
        completion = service.submit(http, body, prompt_ids)
        answer = ChatAnswer(service, body, completion)
        if body.stream:
            return CompletionStream(completion, answer.frames(), service.settings.keep_alive)
        await finish(completion, http)
        return JSONResponse(answer.whole())

    return routes


class ChatAnswer:
    """Formats a completion."""

    def __init__(self, service: Service, body: ChatRequest, completion: Completion) -> None:
        """Give the answer a name."""
        self._tokenizer: Tokenizer = service.tokenizer
        self._body = body
        self._completion = completion
        self._head = {
            "id": response_id("chatcmpl"),
            "created": int(service.created),
            "model": service.names[0],
        }

    def whole(self) -> dict[str, Any]:
        """The response, once all answers are finished."""
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(i, text) for i, text in enumerate(self._completion.texts)],
            "usage": usage(self._completion.usage),
        }

    async def frames(self) -> AsyncIterator[bytes]:
        """The server-sent events of a stream."""
        async for event in self._completion:
            if event.iteration == 0:
                yield self._frame(event, {"role": "assistant", "content": ""})
            delta = {"content": event.chunk.text} if event.chunk.text else {}
            yield self._frame(event, delta, **self._details(event))
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield self._chunk(choices=[], usage=usage(self._completion.usage))
        yield DONE

    def _choice(self, index: int, text: Assembler) -> dict[str, Any]:
        chunks = text.chunks
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(chunk.text for chunk in chunks)},
            "finish_reason": text.finish_reason,
            "logprobs": {"content": token_log_probs(self._tokenizer, chunks)}
            if self._body.logprobs
            else None,
        }

    def _details(self, event: Event) -> dict[str, Any]:
        """What was asked for beside the text."""
        details: dict[str, Any] = {"finish_reason": event.chunk.finish_reason}
        if self._body.logprobs:
            content = token_log_probs(self._tokenizer, [event.chunk])
            details["logprobs"] = {"content": content}
        options = self._body.stream_options
        if options is not None and options.include_draft_trees:
            details["draft_tree"] = draft_tree(self._tokenizer, event)
        return details

    def _frame(self, event: Event, delta: dict[str, Any], **details: Any) -> bytes:
        choice = {"index": event.index, "delta": delta, "finish_reason": None, **details}
        return self._chunk(choices=[choice])

    def _chunk(self, **fields: Any) -> bytes:
        return frame({**self._head, "object": "chat.completion.chunk", **fields})
