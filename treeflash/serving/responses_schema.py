"""The body of a request to `/v1/responses`, and the conversation that it describes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from treeflash.serving.conversation import Conversation
from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.messages import parsed_arguments
from treeflash.serving.schemas import DecodingSchema, Schema
from treeflash.serving.structured_output import (
    JSONObjectFormat,
    JSONSchemaFormat,
    NamedSchema,
    TextFormat,
    answer_grammar,
)
from treeflash.serving.tools import (
    Function,
    FunctionName,
    NamedFunction,
    NamedToolChoice,
    Tool,
    allowed_tools,
)

Status = Literal["in_progress", "completed", "incomplete"] | None


class Part(Schema):
    """A text in a message, or in what a function returned."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Text = str | list[Part]


class MessageItem(Schema):
    """One turn of a conversation."""

    type: Literal["message"] = "message"
    id: str | None = None
    status: Status = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class CallItem(Schema):
    """A call that the model has made; the arguments are a JSON object, as text."""

    type: Literal["function_call"]
    id: str | None = None
    status: Status = None
    call_id: str
    name: str
    arguments: str


class OutputItem(Schema):
    """What the function returned."""

    type: Literal["function_call_output"]
    id: str | None = None
    status: Status = None
    call_id: str
    output: Text


class ReasoningItem(Schema):
    """What the model thought before the next item."""

    type: Literal["reasoning"]
    id: str | None = None
    status: Status = None
    summary: list[Part] = Field(default_factory=list)
    content: list[Part] | None = None
    encrypted_content: None = None


Item = MessageItem | CallItem | OutputItem | ReasoningItem


class ResponseTool(Schema):
    """A function that the model may call. No other tools are supported."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        """In the form of chat completions."""
        function = Function(**self.model_dump(exclude={"type"}))
        return Tool(type="function", function=function)


class ResponseToolChoice(Schema):
    """The function that the model must call."""

    type: Literal["function"]
    name: str


class ResponseSchemaFormat(NamedSchema):
    """JSON that conforms to a schema."""

    type: Literal["json_schema"]


class TextConfig(Schema):
    """The form of the answer's text."""

    format: (
        Annotated[TextFormat | JSONObjectFormat | ResponseSchemaFormat, Field(discriminator="type")]
        | None
    ) = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Schema):
    """Whether the model thinks first; no model here has degrees of it, nor summaries."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto"] | None = None


class StreamOptions(Schema):
    """Nothing is padded."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Schema):
    """The body. The server keeps nothing: `store` and what needs it are refused.

    `prompt_cache_key`, `safety_identifier`, `user` and `metadata` change nothing here: prompts are
    cached without a key.
    """

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: FiniteFloat | None = Field(None, ge=0)
    top_p: FiniteFloat | None = Field(None, gt=0, le=1)
    tools: list[ResponseTool] | None = Field(None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: Literal[False] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    background: Literal[False] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    client_metadata: dict[str, str] | None = None

    def decoding(self) -> DecodingSchema:
        """How to decode."""
        given = {
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        return DecodingSchema.model_validate(given)

    def conversation(self, *, knows_thinking: bool) -> Conversation:
        """What is to be continued, and how.

        Args:
            knows_thinking: whether the model can think first.

        Raises:
            APIError: the fields do not fit each other or the model.
        """
        choice: Any = self.tool_choice
        if isinstance(choice, ResponseToolChoice):
            choice = NamedToolChoice(type="function", function=NamedFunction(name=choice.name))
        tools, must_call = allowed_tools([tool.tool() for tool in self.tools or ()], choice)
        response_format: Any = None if self.text is None else self.text.format
        if isinstance(response_format, ResponseSchemaFormat):
            response_format = JSONSchemaFormat(type="json_schema", json_schema=response_format)
        grammar = answer_grammar(response_format, None)
        return Conversation(
            messages=self._messages(),
            template_args=self._template_args(knows_thinking),
            tools=tools,
            must_call=must_call,
            parallel=self.parallel_tool_calls is not False,
            grammar=None if grammar is None else (grammar[0], "text"),
        )

    def _template_args(self, knows_thinking: bool) -> dict[str, Any]:
        effort = None if self.reasoning is None else self.reasoning.effort
        if effort is None:
            return {}
        thinks = effort not in ("none", "minimal")
        if thinks and not knows_thinking:
            raise APIError(
                BAD_REQUEST,
                "reasoning.effort: this model does not think first; leave it out",
                param="reasoning.effort",
            )
        return {"enable_thinking": thinks} if knows_thinking else {}

    def _messages(self) -> list[dict[str, Any]]:
        """As chat templates read them: items of one turn become one message."""
        found: list[dict[str, Any]] = []
        if self.instructions:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, OutputItem):
                found.append(
                    {"role": "tool", "tool_call_id": item.call_id, "content": _join(item.output)}
                )
            elif isinstance(item, MessageItem) and item.role != "assistant":
                role = "system" if item.role == "developer" else item.role
                found.append({"role": role, "content": _join(item.content)})
            else:
                if not found or found[-1]["role"] != "assistant":
                    found.append({"role": "assistant", "content": ""})
                _extend(found[-1], item)
        if found[0]["role"] == "system" and len(found) > 1 and found[1]["role"] == "system":
            # Most chat templates take one system message.
            first, second, *others = found
            joined = f"{first['content']}\n\n{second['content']}"
            found = [{"role": "system", "content": joined}, *others]
        return found


def _extend(message: dict[str, Any], item: Item) -> None:
    """Add an item to an assistant's message."""
    if isinstance(item, MessageItem):
        message["content"] += _join(item.content)
    elif isinstance(item, ReasoningItem):
        thought = _join(item.content or [])
        message["reasoning_content"] = message.get("reasoning_content", "") + thought
    elif isinstance(item, CallItem):
        function = {"name": item.name, "arguments": parsed_arguments(item.arguments)}
        call = {"id": item.call_id, "type": "function", "function": function}
        message.setdefault("tool_calls", []).append(call)


def _join(text: Text) -> str:
    return text if isinstance(text, str) else "".join(part.text for part in text)
