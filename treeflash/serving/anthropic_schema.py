"""The body of a request to `/v1/messages`, and the conversation that it describes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from treeflash.serving.conversation import Conversation
from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.grammars import Grammar
from treeflash.serving.schemas import DecodingSchema, Schema, StopString
from treeflash.serving.tools import (
    Function,
    FunctionName,
    NamedFunction,
    NamedToolChoice,
    Tool,
    allowed_tools,
)


class CacheControl(Schema):
    """Where a prompt may be cached; this server caches all prompts."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Schema):
    """A part of a message."""

    cache_control: CacheControl | None = None


class TextBlock(Block):
    """Text."""

    type: Literal["text"]
    text: str
    citations: None = None


class ThinkingBlock(Block):
    """What the model thought; nothing is signed here."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Block):
    """A call that the model has made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Block):
    """What the function returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


ContentBlock = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class AnthropicMessage(Schema):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[ContentBlock]

    def templates(self) -> list[dict[str, Any]]:
        """As chat templates read them: results of tools are messages of their own."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        results = [block for block in self.content if isinstance(block, ToolResultBlock)]
        found: list[dict[str, Any]] = [
            {
                "role": "tool",
                "tool_call_id": block.tool_use_id,
                "content": ("Error: " if block.is_error else "") + _join(block.content or ""),
            }
            for block in results
        ]
        others = [block for block in self.content if block not in results]
        if others or not found:
            found.append({"role": self.role, **_content(others)})
        return found


class AnthropicTool(Block):
    """A function that the model may call. No other tools are supported."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    def tool(self) -> Tool:
        """In OpenAI's form."""
        function = Function(
            name=self.name,
            description=self.description,
            parameters=self.input_schema,
            strict=self.strict,
        )
        return Tool(type="function", function=function)


class AnthropicToolChoice(Schema):
    """Whether to call a function."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Schema):
    """Whether the model thinks first. Its thoughts count as output, and have no limit of their own.

    Attributes:
        type: `enabled` and `adaptive` are the same here.
        budget_tokens: only checked to be below `max_tokens`.
        display: thoughts are always sent.
    """

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized"] | None = None


class JSONOutputFormat(Schema):
    """JSON that conforms to a schema."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Schema):
    """The form of the answer's text."""

    format: JSONOutputFormat | None = None


class Metadata(Schema):
    """Names the client's own user, which changes nothing here."""

    user_id: str | None = None


class CountTokensRequest(Schema):
    """The fields that make the prompt."""

    model: str | None = None
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[AnthropicTool] | None = Field(None, max_length=256)
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    def conversation(self, *, knows_thinking: bool) -> Conversation:
        """What is to be continued, and how.

        Args:
            knows_thinking: whether the model can think first.

        Raises:
            APIError: the fields do not fit each other or the model.
        """
        messages = [found for message in self.messages for found in message.templates()]
        if self.system:
            messages.insert(0, {"role": "system", "content": _join(self.system)})
        choice = self.tool_choice
        tools, must_call = allowed_tools([tool.tool() for tool in self.tools or ()], _named(choice))
        grammar = None
        if self.output_config is not None and self.output_config.format is not None:
            schema = self.output_config.format.json_schema
            grammar = Grammar.json(schema), "output_config.format"
        return Conversation(
            messages=messages,
            template_args=self._template_args(knows_thinking),
            tools=tools,
            must_call=must_call,
            parallel=choice is None or not choice.disable_parallel_tool_use,
            grammar=grammar,
        )

    def _template_args(self, knows_thinking: bool) -> dict[str, Any]:
        if self.thinking is None:
            return {}
        thinks = self.thinking.type != "disabled"
        if thinks and not knows_thinking:
            raise APIError(
                BAD_REQUEST,
                "thinking: this model does not think first; leave it out",
                param="thinking",
            )
        return {"enable_thinking": thinks} if knows_thinking else {}


class MessagesRequest(CountTokensRequest):
    """The body."""

    max_tokens: int = Field(ge=1)
    temperature: FiniteFloat | None = Field(None, ge=0)
    top_p: FiniteFloat | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    stop_sequences: Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def decoding(self) -> DecodingSchema:
        """How to decode.

        Raises:
            APIError: the thoughts may not be longer than the answer.
        """
        thoughts = None if self.thinking is None else self.thinking.budget_tokens
        if thoughts is not None and thoughts >= self.max_tokens:
            raise APIError(
                BAD_REQUEST,
                "thinking.budget_tokens must be below max_tokens",
                param="thinking.budget_tokens",
            )
        given = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences or None,
        }
        return DecodingSchema.model_validate(given)


def _named(choice: AnthropicToolChoice | None) -> Any:
    """A choice in OpenAI's form."""
    if choice is None or choice.type == "auto":
        return None
    if choice.type == "none":
        return "none"
    if choice.type == "any":
        return "required"
    if choice.name is None:
        raise APIError(BAD_REQUEST, "tool_choice needs a name", param="tool_choice.name")
    return NamedToolChoice(type="function", function=NamedFunction(name=choice.name))


def _content(blocks: list[Any]) -> dict[str, Any]:
    """The fields of a message that chat templates read."""
    found: dict[str, Any] = {"content": "".join(x.text for x in blocks if x.type == "text")}
    if thoughts := "".join(x.thinking for x in blocks if x.type == "thinking"):
        found["reasoning_content"] = thoughts
    calls = [x for x in blocks if x.type == "tool_use"]
    if calls:
        found["tool_calls"] = [
            {"id": x.id, "type": "function", "function": {"name": x.name, "arguments": x.input}}
            for x in calls
        ]
    return found


def _join(text: str | list[TextBlock]) -> str:
    return text if isinstance(text, str) else "\n\n".join(block.text for block in text)
