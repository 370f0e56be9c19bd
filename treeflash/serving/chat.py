"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from pydantic import Field

from treeflash.serving.completion import Event
from treeflash.serving.conversation import Answers, Conversation
from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.log_probs import token_log_probs
from treeflash.serving.message_parser import Delta, MessageParser, ToolCall
from treeflash.serving.messages import Message, templates
from treeflash.serving.schemas import MAX_LOG_PROBS, DecodingSchema
from treeflash.serving.service import Service, response_id, usage
from treeflash.serving.streaming import DONE, CompletionStream, finish, frame
from treeflash.serving.structured_output import ResponseFormat, StructuredOutputs, answer_grammar
from treeflash.serving.tools import Tool, ToolChoice, allowed_tools
from treeflash.serving.trees import draft_tree
from treeflash.text.assembler import Assembler
from treeflash.text.options import Options
from treeflash.text.tokenizer import Tokenizer


class ChatRequest(DecodingSchema):
    """The body of a request."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOG_PROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: list[Tool] | None = Field(None, max_length=256)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # Of vllm-router too.
    continue_final_message: Literal[False] | None = None
    separate_reasoning: Literal[True] | None = None
    stream_reasoning: Literal[True] | None = None
    include_reasoning: Literal[True] | None = None

    def conversation(self) -> Conversation:
        """What is to be continued, and how."""
        tools, must_call = allowed_tools(self.tools, self.tool_choice)
        return Conversation(
            messages=templates(self.messages),
            template_args=self.chat_template_kwargs or {},
            tools=tools,
            must_call=must_call,
            parallel=self.parallel_tool_calls is not False,
            grammar=answer_grammar(self.response_format, self.structured_outputs),
        )

    def options(self) -> Options:
        """The decoding options that were given."""
        options = super().options()
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise APIError(
                    BAD_REQUEST,
                    "max_tokens and max_completion_tokens mean the same, and differ",
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
        answers = await body.conversation().start(service, http, body)
        answer, completion = ChatAnswer(service, body, answers), answers.completion
        if body.stream:
            return CompletionStream(completion, answer.frames(), service.settings.keep_alive)
        await finish(completion, http)
        return JSONResponse(answer.whole())

    return routes


class ChatAnswer:
    """Formats a completion."""

    def __init__(self, service: Service, body: ChatRequest, answers: Answers) -> None:
        """Give the answer a name."""
        self._tokenizer: Tokenizer = service.tokenizer
        self._body = body
        self._completion = answers.completion
        self._parsers = answers.parsers
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
            parser = self._parsers[event.index]
            fields = _delta(parser, parser.feed(event.chunk))
            yield self._frame(event, fields, **self._details(event))
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield self._chunk(choices=[], usage=usage(self._completion.usage))
        yield DONE

    def _choice(self, index: int, text: Assembler) -> dict[str, Any]:
        chunks, parser = text.chunks, self._parsers[index]
        for chunk in chunks:
            parser.feed(chunk)
        message: dict[str, Any] = {"role": "assistant", "content": parser.content or None}
        if not parser.calls:
            message["content"] = parser.content
        else:
            message["tool_calls"] = [_call(call) for call in parser.calls]
        if parser.reasoning:
            message["reasoning_content"] = parser.reasoning
        return {
            "index": index,
            "message": message,
            "finish_reason": finish_reason(text.finish_reason, parser),
            "logprobs": {"content": token_log_probs(self._tokenizer, chunks)}
            if self._body.logprobs
            else None,
        }

    def _details(self, event: Event) -> dict[str, Any]:
        """What was asked for beside the text."""
        reason = finish_reason(event.chunk.finish_reason, self._parsers[event.index])
        details: dict[str, Any] = {"finish_reason": reason}
        if self._body.logprobs:
            content = token_log_probs(self._tokenizer, [event.chunk])
            details["logprobs"] = {"content": content}
        options = self._body.stream_options
        if options is not None and options.include_draft_trees:
            details["draft_tree"] = draft_tree(self._tokenizer, event)
        return details

    def _frame(self, event: Event, delta: dict[str, Any], **details: Any) -> bytes:
        choice = {"index": event.index, "delta": delta, "finish_reason": None, **details}
        if self._body.usage_in_chunks:
            return self._chunk(choices=[choice], usage=usage(self._completion.usage))
        return self._chunk(choices=[choice])

    def _chunk(self, **fields: Any) -> bytes:
        return frame({**self._head, "object": "chat.completion.chunk", **fields})


def finish_reason(reason: str | None, parser: MessageParser) -> str | None:
    """`tool_calls` if a message ended by itself after calls."""
    return "tool_calls" if reason == "stop" and parser.calls else reason


def _delta(parser: MessageParser, deltas: list[Delta]) -> dict[str, Any]:
    """What a chunk adds to a message, in OpenAI's form."""
    fields: dict[str, Any] = {}
    for kind, name in (("content", "content"), ("reasoning", "reasoning_content")):
        if text := "".join(delta.text for delta in deltas if delta.kind == kind):
            fields[name] = text
    calls = [delta.call for delta in deltas if delta.call is not None]
    if calls:
        first = len(parser.calls) - len(calls)
        fields["tool_calls"] = [{"index": first + i, **_call(x)} for i, x in enumerate(calls)]
    return fields


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
