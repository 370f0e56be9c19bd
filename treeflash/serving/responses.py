"""`/v1/responses`: OpenAI's responses, without stored ones; Codex uses this API."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import count
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from pydantic import Field

from treeflash.serving.engine import Completion
from treeflash.serving.errors import APIError, api_error, bad_request
from treeflash.serving.message_parser import MessageParser, MessagePart, PartChange, ToolCall
from treeflash.serving.models import ModelPool
from treeflash.serving.schemas import (
    MAX_TOOLS,
    Breakable,
    CallMode,
    Function,
    FunctionName,
    FunctionTyped,
    Items,
    JSONSchemaFormat,
    LongList,
    Metadata,
    NamedFunction,
    NamedSchema,
    PlainFormat,
    PromptCaching,
    ReasoningEffort,
    Schema,
    Temperature,
    TextContent,
    TopP,
    Verbosity,
    allowed_tools,
    embedded_image,
    format_grammar,
    function_call,
    given_options,
    parsed_arguments,
    thinks,
)
from treeflash.serving.service import Conversation, Service
from treeflash.serving.streaming import Formatter, cached_details, draft_details, frame, respond
from treeflash.text.options import Options
from treeflash.text.prompt import Content, content_of

logger = logging.getLogger("treeflash.serving")


NOT_ECHOED = {"input", "stream", "stream_options", "client_metadata", "prompt_cache_options"}
"""The fields of a request that the response does not repeat."""


class ContentPart(TextContent, Breakable):
    """A text in a message, in reasoning or in the result of a call."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputImage(Breakable):
    """An image in a message of the user or in the result of a call."""

    type: Literal["input_image"]
    image_url: str | None = None
    file_id: str | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None  # changes nothing here

    def template(self) -> dict[str, Any]:
        """Return the part as one of a prompt; an APIError if its bytes are elsewhere."""
        return embedded_image(self.image_url, "image_url")


ItemContent = str | Items[Annotated[ContentPart | InputImage, Field(discriminator="type")]]


class InputItem(Schema):
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(InputItem):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: ItemContent


class CallItem(InputItem):
    """A call that the model has made; the arguments are a JSON object, as text."""

    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class CallOutputItem(InputItem):
    type: Literal["function_call_output"]
    call_id: str
    output: ItemContent


class ReasoningItem(InputItem):
    """The model's reasoning before the next item."""

    type: Literal["reasoning"]
    summary: Items[ContentPart] = Field(default_factory=list)
    content: Items[ContentPart] | None = None


class ItemReference(InputItem):
    """An item that the server is to have stored; it is always refused."""

    type: Literal["item_reference"]


Item = MessageItem | CallItem | CallOutputItem | ReasoningItem | ItemReference


class ResponseFunction(Function, FunctionTyped):
    """A function that the model may call."""


class Namespace(Schema):
    """A group of functions. The model sees each as `NAMESPACE.FUNCTION`."""

    type: Literal["namespace"]
    name: FunctionName
    description: str | None = None
    tools: Items[ResponseFunction]


class WebSearch(Schema):
    """OpenAI's hosted web search. It is accepted and ignored: this server has none."""

    type: Literal["web_search"]
    external_web_access: bool | None = None
    filters: dict[str, Any] | None = None
    search_content_types: LongList[str] | None = None
    search_context_size: Literal["low", "medium", "high"] | None = None
    user_location: dict[str, Any] | None = None


ResponseTool = Annotated[ResponseFunction | Namespace | WebSearch, Field(discriminator="type")]


class ResponseToolChoice(NamedFunction, FunctionTyped):
    """The function that the model must call."""


class ResponseToolSubset(Schema):
    """The functions of `tools` that the model may call."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items[ResponseToolChoice] = Field(min_length=1)


class ResponseSchemaFormat(NamedSchema):
    type: Literal["json_schema"]


class TextSettings(Schema):
    format: Annotated[PlainFormat | ResponseSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Verbosity | None = None  # changes nothing here


class Reasoning(Schema):
    """Whether the model reasons first. There are no degrees of reasoning and no summaries here."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(Schema):
    """`stream_options`: only False is accepted, because no event is padded."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(PromptCaching):
    """The body of a request. The server keeps no responses and refuses fields that need them.

    `safety_identifier`, `user` and `metadata` change nothing here.
    """

    model: str | None = None
    input: str | Annotated[Items[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: Temperature | None = None
    top_p: TopP | None = None
    tools: Items[ResponseTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: (
        CallMode
        | Annotated[ResponseToolChoice | ResponseToolSubset, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None  # whatever it asks for, nothing is stored, and the response says so
    previous_response_id: str | None = None  # always refused, in a form that clients know
    include: LongList[Literal["reasoning.encrypted_content"]] | None = None
    truncation: Literal["auto", "disabled"] | None = None  # nothing is ever left out
    service_tier: Literal["auto", "default"] | None = None
    background: Literal[False] | None = None
    safety_identifier: str | None = None
    user: str | None = None
    metadata: Metadata | None = None
    client_metadata: Metadata | None = None

    def options(self) -> Options:
        options = given_options(self)
        if self.max_output_tokens is not None:
            options["max_tokens"] = self.max_output_tokens
        return options

    def conversation(self) -> Conversation:
        """Build the conversation; an APIError if fields do not fit each other, or need a store."""
        if self.previous_response_id is not None:
            # Clients know this code, and then send the whole conversation.
            raise _not_stored("previous_response_id", "previous_response_not_found")
        choice, among = self.tool_choice, None
        if isinstance(choice, ResponseToolSubset):
            among = [tool.name for tool in choice.tools]
            choice = choice.mode
        effort = None if self.reasoning is None else self.reasoning.effort
        tools = allowed_tools(
            self._functions(), choice, among=among, parallel=self.parallel_tool_calls
        )
        response_format: Any = None if self.text is None else self.text.format
        if isinstance(response_format, ResponseSchemaFormat):
            response_format = JSONSchemaFormat(type="json_schema", json_schema=response_format)
        grammar = format_grammar(response_format)
        return Conversation(
            messages=self._messages(),
            reasoning=None if effort is None else (thinks(effort), "reasoning.effort"),
            tools=tools,
            grammar=None if grammar is None else (grammar, "text"),
        )

    def _functions(self) -> list[Function]:
        """Return the functions of all namespaces; other tools are left out."""
        functions: list[Function] = []
        for tool in self.tools or ():
            if isinstance(tool, Namespace):
                functions += [
                    function.model_copy(update={"name": _qualified(tool.name, function.name)})
                    for function in tool.tools
                ]
            elif isinstance(tool, ResponseFunction):
                functions.append(tool)
            else:
                logger.info("the tool %s is ignored, because this server has none", tool.type)
        return functions

    def namespaces(self) -> dict[str, tuple[str, str]]:
        """Return the namespace and the function of each name that the model sees."""
        return {
            _qualified(tool.name, function.name): (tool.name, function.name)
            for tool in self.tools or ()
            if isinstance(tool, Namespace)
            for function in tool.tools
        }

    def echo(self) -> dict[str, Any]:
        """Return what responses repeat of the request; an APIError if it is not JSON."""
        echo = self.model_dump(by_alias=True, exclude=NOT_ECHOED)
        try:
            json.dumps(echo, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise bad_request(f"the body is not valid JSON: {error}", None) from error
        return echo

    def _messages(self) -> list[dict[str, Any]]:
        """Return the messages that chat templates read: items of one turn become one message."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, ItemReference):
                raise _not_stored("input")
            if isinstance(item, CallOutputItem):
                content = _content_of(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
            elif isinstance(item, MessageItem) and item.role == "user":
                messages.append({"role": "user", "content": _content_of(item.content)})
            elif isinstance(item, MessageItem) and item.role != "assistant":
                messages.append({"role": "system", "content": _join(item.content)})
            else:
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                _extend(messages[-1], item)
        while [message["role"] for message in messages[:2]] == ["system", "system"]:
            # Most chat templates accept one system message only.
            messages[0]["content"] += f"\n\n{messages.pop(1)['content']}"
        return messages


def _not_stored(param: str, code: str | None = None) -> APIError:
    message = "this server stores no responses; send the whole conversation, with store: false"
    return bad_request(message, param, code)


def _extend(message: dict[str, Any], item: MessageItem | CallItem | ReasoningItem) -> None:
    if isinstance(item, MessageItem):
        message["content"] += _join(item.content)
    elif isinstance(item, ReasoningItem):
        thought = _join(item.content or [])
        message["reasoning_content"] = message.get("reasoning_content", "") + thought
    else:
        name = _qualified(item.namespace, item.name)
        call = function_call(item.call_id, name, parsed_arguments(item.arguments))
        message.setdefault("tool_calls", []).append(call)


def _qualified(namespace: str | None, name: str) -> str:
    """Return the name by which the model knows a function."""
    return name if namespace is None else f"{namespace}.{name}"


def _content_of(content: ItemContent) -> Content:
    if isinstance(content, str):
        return content
    return content_of([part.template() for part in content])


def _join(content: str | Sequence[ContentPart | InputImage]) -> str:
    """Join the texts of a content; an APIError if it has images."""
    if isinstance(content, str):
        return content
    if any(isinstance(part, InputImage) for part in content):
        raise bad_request("only messages of the user and results of calls can have images", "input")
    return "".join(part.text for part in content if isinstance(part, ContentPart))


def add_routes(app: FastAPI, pool: ModelPool) -> None:

    @app.post("/v1/responses")
    async def responses(request: ResponsesRequest, http: HTTPRequest) -> Response:
        async with pool.use(request.model, http) as service:
            conversation, echo = request.conversation(), request.echo()
            completion, (parser,) = await conversation.start(service, http, request.options())
            answer = ResponsesFormatter(service, request, echo, completion, parser)
            return await respond(service, http, completion, answer, request.stream)


class ResponsesFormatter(Formatter):
    """Writes a completion of one answer in the form of `/v1/responses`."""

    def __init__(
        self,
        service: Service,
        request: ResponsesRequest,
        echo: dict[str, Any],
        completion: Completion,
        parser: MessageParser,
    ) -> None:
        self._completion = completion
        self._parser = parser
        self._namespaces = request.namespaces()
        self._ids: dict[int, str] = {}
        self._numbers = count()
        self._head: dict[str, Any] = {
            **echo,
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": service.name,
            "error": None,
            "incomplete_details": None,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "tool_choice": echo["tool_choice"] or "auto",
            "tools": echo["tools"] or [],
            "metadata": request.metadata or {},
            "store": False,
        }

    def body(self) -> dict[str, Any]:
        self._parser.read(self._completion.answers[0].chunks)
        return self._finished()

    async def frames(self) -> AsyncIterator[bytes]:
        begun = self._begun()
        yield self._frame("response.created", response=begun)
        yield self.idle_frame()
        try:
            async for update in self._completion:
                for change in self._parser.feed(update.chunk):
                    for data in self._change_frames(change):
                        yield data
        except Exception as error:
            reason = api_error(error)
            fault = {"code": reason.code or "server_error", "message": reason.message}
            yield self._frame("error", **fault, param=reason.param)
            failed = {**begun, "status": "failed", "error": fault}
            yield self._frame("response.failed", response=failed)
            return
        finished = self._finished()
        yield self._frame(f"response.{finished['status']}", response=finished)

    def idle_frame(self) -> bytes:
        """Return an event: Codex gives a stream up where only comments come for minutes."""
        return self._frame("response.in_progress", response=self._begun())

    def _begun(self) -> dict[str, Any]:
        return {**self._head, "status": "in_progress", "output": [], "usage": None}

    def _change_frames(self, change: PartChange) -> Iterator[bytes]:
        part = change.part
        index = {"output_index": part.index}
        item = {**index, "item_id": self._id(part)}
        content = {**item, "content_index": 0}
        name = "reasoning_text" if part.kind == "reasoning" else "output_text"
        logs: dict[str, Any] = {} if part.kind == "reasoning" else {"logprobs": []}
        arguments = "response.function_call_arguments"
        if change.event == "text":
            yield self._frame(f"response.{name}.delta", **content, delta=change.text, **logs)
        elif change.event == "open":
            empty: dict[str, Any] = {"arguments": ""} if part.call else {"content": []}
            added = self._item(part, "in_progress") | empty
            yield self._frame("response.output_item.added", **index, item=added)
            if part.call is None:
                yield self._frame("response.content_part.added", **content, part=_content(part))
            else:
                yield self._frame(f"{arguments}.delta", **item, delta=part.call.arguments)
        else:
            if part.call is None:
                yield self._frame(f"response.{name}.done", **content, text=part.text, **logs)
                yield self._frame("response.content_part.done", **content, part=_content(part))
            else:
                yield self._frame(f"{arguments}.done", **item, **self._call(part.call))
            yield self._frame("response.output_item.done", **index, item=self._done(part))

    def _finished(self) -> dict[str, Any]:
        cut_off = self._completion.answers[0].finish_reason == "length"
        return {
            **self._head,
            "status": "incomplete" if cut_off else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
            "completed_at": int(time.time()),
            "output": [self._done(part) for part in self._parser.parts],
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        counts = self._completion.usage
        cached = {**cached_details(counts), "cache_write_tokens": 0}
        (answer,) = self._completion.answers
        ids = [token for chunk in answer.chunks for token in chunk.token_ids]
        return {
            "input_tokens": counts.prompt_tokens,
            "input_tokens_details": cached,
            "output_tokens": counts.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._parser.count_reasoning(ids)},
            "total_tokens": counts.prompt_tokens + counts.completion_tokens,
            "draft_tokens_details": draft_details(counts),
        }

    def _done(self, part: MessagePart) -> dict[str, Any]:
        return self._item(part, "incomplete" if part.cut_off else "completed")

    def _item(self, part: MessagePart, status: str) -> dict[str, Any]:
        head = {"id": self._id(part), "status": status}
        if part.call is not None:
            call = {"call_id": part.call.id, **self._call(part.call)}
            return {"type": "function_call", **head, **call}
        if part.kind == "reasoning":
            return {"type": "reasoning", **head, "summary": [], "content": [_content(part)]}
        return {"type": "message", **head, "role": "assistant", "content": [_content(part)]}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        """Return a call's name and arguments, and the namespace if the function has one."""
        if call.name not in self._namespaces:
            return {"name": call.name, "arguments": call.arguments}
        namespace, name = self._namespaces[call.name]
        return {"namespace": namespace, "name": name, "arguments": call.arguments}

    def _id(self, part: MessagePart) -> str:
        prefix = {"content": "msg", "reasoning": "rs", "call": "fc"}[part.kind]
        return self._ids.setdefault(part.index, f"{prefix}_{secrets.token_hex(12)}")

    def _frame(self, event: str, **fields: Any) -> bytes:
        data = {"type": event, "sequence_number": next(self._numbers), **fields}
        return frame(data, event)


def _content(part: MessagePart) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}
