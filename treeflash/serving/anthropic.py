"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's API, which Claude Code uses."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from pydantic import Field

from treeflash.serving.engine import Completion
from treeflash.serving.errors import APIError, bad_request
from treeflash.serving.message_parser import MessageParser, MessagePart, PartChange
from treeflash.serving.models import ModelPool
from treeflash.serving.schemas import (
    MAX_TOOLS,
    CallMode,
    Function,
    FunctionName,
    Items,
    NamedFunction,
    Schema,
    StopString,
    Temperature,
    TextContent,
    TopK,
    TopP,
    allowed_tools,
    base64_image,
    embedded_image,
    function_call,
    given_options,
)
from treeflash.serving.service import Conversation, Service
from treeflash.serving.streaming import Formatter, frame, respond
from treeflash.text.grammar import Grammar
from treeflash.text.options import Options
from treeflash.text.prompt import content_of, text_part


class CacheControl(Schema):
    """The end of a prefix to cache; this server caches all prompts anyway."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Cacheable(Schema):
    """A part of a prompt that may mark the end of a prefix to cache."""

    cache_control: CacheControl | None = None


class TextBlock(TextContent, Cacheable):
    """A text, which may mark the end of a prefix to cache."""

    type: Literal["text"]


class ImageSource(Schema):
    type: Literal["base64", "url", "file"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    file_id: str | None = None


class ImageBlock(Cacheable):
    type: Literal["image"]
    source: ImageSource

    def template(self) -> dict[str, Any]:
        """Return the block as a part of a prompt; an APIError if its bytes are elsewhere."""
        data = self.source.data if self.source.type == "base64" else None
        return embedded_image(None, "source") if data is None else base64_image(data)


class ThinkingBlock(Cacheable):
    """Reasoning of the model; this server neither makes nor checks signatures."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Cacheable):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Cacheable):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Items[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]] | None = (
        None
    )
    is_error: bool | None = None

    def template(self) -> dict[str, Any]:
        """Return the message that chat templates read, with the images after the text."""
        blocks = [] if self.content is None or isinstance(self.content, str) else self.content
        text = self.content if isinstance(self.content, str) else ""
        text += _join([block for block in blocks if isinstance(block, TextBlock)])
        images = [block.template() for block in blocks if isinstance(block, ImageBlock)]
        parts = [text_part(("Error: " if self.is_error else "") + text), *images]
        return {
            "role": "tool",
            "tool_call_id": self.tool_use_id,
            "content": content_of(parts),
        }


ContentBlock = Annotated[
    TextBlock | ImageBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]


ROLES = {"thinking": "assistant", "tool_use": "assistant", "tool_result": "user"}
"""The role of messages that can have such a block."""


class AnthropicMessage(Schema):
    role: Literal["system", "user", "assistant"]
    content: str | Items[ContentBlock]

    def templates(self) -> list[dict[str, Any]]:
        """Convert to messages of chat templates; each tool result becomes its own message.

        Raises an APIError for a block that only messages of another role can have.
        """
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        messages: list[dict[str, Any]] = []
        parts: list[dict[str, Any]] = []
        fields: dict[str, Any] = {}
        for block in self.content:
            if (role := ROLES.get(block.type, self.role)) != self.role:
                message = f"only messages with the role {role} can have a {block.type}"
                raise bad_request(message, "messages")
            if isinstance(block, ToolResultBlock):
                messages.append(block.template())
            elif isinstance(block, TextBlock | ImageBlock):
                parts.append(block.template())
            elif isinstance(block, ToolUseBlock):
                call = function_call(block.id, block.name, block.input)
                fields.setdefault("tool_calls", []).append(call)
            elif block.thinking:
                fields["reasoning_content"] = fields.get("reasoning_content", "") + block.thinking
        if len(messages) < len(self.content) or not messages:
            messages.append({"role": self.role, "content": content_of(parts), **fields})
        return messages


class AnthropicTool(Cacheable):
    """A function that the model may call. Other kinds of tools are not supported."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None  # a call is sent when it is complete

    def function(self) -> Function:
        """Return the tool in the form of chat completions."""
        fields = self.model_dump(include={"name", "description", "strict"})
        return Function(**fields, parameters=self.input_schema)


class AnthropicToolChoice(Schema):
    """Whether the model must call a function, and which one."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def chat_choice(self) -> CallMode | NamedFunction | None:
        """Return the choice in the form of chat completions."""
        if self.type == "tool":
            if self.name is None:
                problem, param = "needs the name of a tool", "tool_choice.name"
                raise bad_request(f"tool_choice of the type tool {problem}; add {param}", param)
            return NamedFunction(name=self.name)
        return "none" if self.type == "none" else "required" if self.type == "any" else None


class Thinking(Schema):
    """Whether the model reasons first, and how many tokens it may take. They count as output.

    `adaptive` is on for models that support reasoning, and off for all others.
    """

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(None, ge=1)
    # Both are accepted, but the reasoning is always sent.
    display: Literal["summarized", "omitted"] | None = None

    @property
    def reasoning(self) -> tuple[bool | Literal["adaptive"], str]:
        """The field in the form of a `Conversation`."""
        return "adaptive" if self.type == "adaptive" else self.type == "enabled", "thinking"


class JSONOutputFormat(Schema):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Schema):
    format: JSONOutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None  # changes nothing here


class AllTurns(Schema):
    type: Literal["all"]


class ClearThinking(Schema):
    """Removes old reasoning from the conversation; only the edit that removes none is accepted."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"] | AllTurns


class ContextManagement(Schema):
    edits: Items[ClearThinking] | None = None


class Metadata(Schema):
    """Identifies the client's own user, which changes nothing here."""

    user_id: str | None = None


class CountTokensRequest(Schema):
    """The fields of a request that make its prompt."""

    model: str | None = None
    messages: Items[AnthropicMessage] = Field(min_length=1)
    system: str | Items[TextBlock] | None = None
    tools: Items[AnthropicTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    cache_control: CacheControl | None = None

    def conversation(self) -> Conversation:
        """Build the conversation; an APIError if fields do not fit each other."""
        messages = [template for message in self.messages for template in message.templates()]
        if self.system:
            messages.insert(0, {"role": "system", "content": _join(self.system)})
        choice, thinking = self.tool_choice, self.thinking
        tools = allowed_tools(
            [tool.function() for tool in self.tools or ()],
            None if choice is None else choice.chat_choice(),
            parallel=choice is None or not choice.disable_parallel_tool_use,
        )
        output = None if self.output_config is None else self.output_config.format
        grammar = None if output is None else Grammar.json(output.json_schema)
        return Conversation(
            messages=messages,
            reasoning=None if thinking is None else thinking.reasoning,
            tools=tools,
            continues=self._continues(),
            grammar=None if grammar is None else (grammar, "output_config.format"),
            thinking_budget=None if thinking is None else thinking.budget_tokens,
        )

    def _continues(self) -> bool:
        """Return whether the last message is the beginning of the answer."""
        last = self.messages[-1]
        blocks = [] if isinstance(last.content, str) else last.content
        if last.role != "assistant":
            return False
        if not all(isinstance(block, TextBlock) for block in blocks):
            raise bad_request(
                "the last message is the assistant's, which the answer continues, so it must be "
                "text only; add the results of its calls, or remove it",
                "messages",
            )
        return True


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1)
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    thread: dict[str, Any] | None = None  # always refused, in the words of Anthropic's API

    def conversation(self) -> Conversation:
        """Build the conversation; an APIError if the server should keep it, or fields do not fit.

        Anthropic's client asks its tools' servers to keep it, and sends all of it if they cannot.
        """
        if self.thread is not None:
            raise APIError(
                400,
                "this server keeps no conversations; remove thread and send all messages",
                param="thread",
                anthropic_details={"error_code": "thread_unsupported_request"},
            )
        return super().conversation()

    def options(self) -> Options:
        """Return the decoding options; an APIError if `budget_tokens` is not below `max_tokens`."""
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            limit = f"must be below max_tokens ({self.max_tokens}), got {budget}"
            raise bad_request(f"thinking.budget_tokens {limit}", "thinking.budget_tokens")
        options = given_options(self)
        if self.stop_sequences:
            options["stop"] = self.stop_sequences
        return options


def _join(text: str | Items[TextBlock]) -> str:
    return text if isinstance(text, str) else "\n\n".join(block.text for block in text)


def add_routes(app: FastAPI, pool: ModelPool) -> None:

    @app.post("/v1/messages")
    async def messages(request: MessagesRequest, http: HTTPRequest) -> Response:
        async with pool.use(request.model, http) as service:
            conversation = request.conversation()
            completion, (parser,) = await conversation.start(service, http, request.options())
            answer = MessagesFormatter(service, completion, parser)
            return await respond(service, http, completion, answer, request.stream)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: CountTokensRequest, http: HTTPRequest) -> dict[str, int]:
        async with pool.use(request.model, http) as service:
            encoded = await request.conversation().encode(service)
            return {"input_tokens": len(encoded.token_ids)}


class MessagesFormatter(Formatter):
    """Writes a completion of one answer in the form of `/v1/messages`."""

    def __init__(self, service: Service, completion: Completion, parser: MessageParser) -> None:
        self._tokenizer = service.tokenizer
        self._completion = completion
        self._parser = parser
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": service.name,
        }

    def body(self) -> dict[str, Any]:
        self._parser.read(self._completion.answers[0].chunks)
        content = [_block(part) for part in self._parser.parts]
        return {**self._head, "content": content, **self._stop(), "usage": self._usage()}

    async def frames(self) -> AsyncIterator[bytes]:
        async for update in self._completion:
            if update.iteration == 0:  # the number of cached tokens is known now
                stop = {"stop_reason": None, "stop_sequence": None}
                head: Any = {**self._head, "content": [], **stop}
                yield _frame("message_start", message={**head, "usage": self._usage()})
            for change in self._parser.feed(update.chunk):
                for data in _change_frames(change):
                    yield data
        yield _frame("message_delta", delta=self._stop(), usage=self._usage())
        yield _frame("message_stop")

    def _usage(self) -> dict[str, int]:
        counts = self._completion.usage
        return {
            "input_tokens": counts.prompt_tokens - counts.cached_tokens,
            "cache_read_input_tokens": counts.cached_tokens,
            "cache_creation_input_tokens": 0,
            **({"disk_cache_read_input_tokens": counts.disk_tokens} if counts.disk_tokens else {}),
            "output_tokens": counts.completion_tokens,
        }

    def _stop(self) -> dict[str, str | None]:
        """Return the reason for the end of the message, and the stop sequence if one ended it."""
        (answer,) = self._completion.answers
        if answer.finish_reason == "length":
            reason = "max_tokens"
        elif answer.stop_string is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if self._parser.calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": answer.stop_string}


def _block(part: MessagePart) -> dict[str, Any]:
    if part.call is not None:
        arguments = json.loads(part.call.arguments)
        return {"type": "tool_use", "id": part.call.id, "name": part.call.name, "input": arguments}
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    return {"type": "text", "text": part.text}


def _change_frames(change: PartChange) -> Iterator[bytes]:
    part, index = change.part, {"index": change.part.index}
    if change.event == "close":
        if part.kind == "reasoning":  # clients drop reasoning whose signature they never got
            delta = {"type": "signature_delta", "signature": ""}
            yield _frame("content_block_delta", **index, delta=delta)
        yield _frame("content_block_stop", **index)
    elif change.event == "text":
        name = "thinking" if part.kind == "reasoning" else "text"
        delta = {"type": f"{name}_delta", name: change.text}
        yield _frame("content_block_delta", **index, delta=delta)
    else:
        block = _block(part) | ({"input": {}} if part.call is not None else {})
        yield _frame("content_block_start", **index, content_block=block)
        if part.call is not None:
            delta = {"type": "input_json_delta", "partial_json": part.call.arguments}
            yield _frame("content_block_delta", **index, delta=delta)


def _frame(kind: str, **fields: Any) -> bytes:
    return frame({"type": kind, **fields}, kind)
