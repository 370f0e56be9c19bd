"""The fields that requests of several endpoints share: decoding, grammars, tools, messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import islice
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from treeflash.config import SEEDS
from treeflash.option import Option
from treeflash.serving.errors import bad_request
from treeflash.text.grammar import Grammar
from treeflash.text.images import DATA_URL
from treeflash.text.options import OPTIONS, Options
from treeflash.text.prompt import content_of, image_part, text_part

MAX_LOG_PROBS = 20
MAX_TOOLS = 256
MAX_ITEMS = 16_384
"""Most objects in a list: a body is checked in the event loop, while all streams wait."""
NEW_SEED = -1
"""The seed that vLLM and llama.cpp replace by a random one."""
MAX_FAULTS = 100
"""Most invalid entries of an object that are described: it has room for a million."""


def limits(name: str) -> Any:
    """Return the limits of an option's numbers in requests."""
    option = OPTIONS[name]
    least, most = option.request_limits or (option.minimum, option.maximum)
    return Field(ge=least, gt=option.above, le=most)


T = TypeVar("T")
V = TypeVar("V")
LongList = Annotated[list[T], Field(fail_fast=True)]
"""A list that is checked up to its first fault."""
Items = Annotated[list[T], Field(fail_fast=True, max_length=MAX_ITEMS)]
"""A list of objects, which take longer to check than numbers and texts."""


def _few_faults(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError as error:
        if (count := error.error_count()) <= MAX_FAULTS:
            raise
    raise PydanticCustomError("faults", "{count} entries are invalid", {"count": count})


Entries = Annotated[dict[T, V], WrapValidator(_few_faults)]
"""An object with any names."""
Metadata = Annotated[Entries[str, str], Field(max_length=MAX_ITEMS)]
TokenId = Annotated[int, Field(ge=0, strict=False)]
Temperature = Annotated[FiniteFloat, limits("temperature")]
TopP = Annotated[FiniteFloat, limits("top_p")]
TopK = Annotated[int, limits("top_k")]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
REQUEST_OPTIONS = {name for name, one in OPTIONS.items() if one.requests}
REQUEST_TYPES = {
    "logit_bias": Entries[TokenId, Annotated[float, limits("logit_bias")]],
    "stop": StopString | Annotated[list[StopString], Field(max_length=16)],
}
"""The types of options in requests that do not follow from the options' own types."""


def request_field(option: Option) -> Any:
    """Return the field of an option in requests: a type and a default, for `create_model`."""
    numbers = {int: int, float: FiniteFloat}
    kinds = [
        Annotated[numbers[kind], limits(option.name)] if kind in numbers else kind
        for kind in option.kinds
    ]
    return REQUEST_TYPES.get(option.name, reduce(or_, kinds)) | None, None


class Schema(BaseModel):
    """A JSON object whose unknown fields are errors, unless their values say that they are not set.

    Clients write fields that they do not use: the objects of the SDKs, sent back, have all fields
    of newer versions of an API as null.
    """

    unset: ClassVar[tuple[Any, ...]] = (None,)
    """The values of fields that are not set."""
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_unset(cls, fields: Any) -> Any:
        known = cls._names()
        if not isinstance(fields, dict) or fields.keys() <= known:
            return fields
        unknown = (x for x, value in fields.items() if x not in known and value not in cls.unset)
        kept = known | set(islice(unknown, 1))  # an error names one field
        return {name: x for name, x in fields.items() if name in kept}

    @classmethod
    @cache
    def _names(cls) -> frozenset[str]:
        return frozenset(field.alias or name for name, field in cls.model_fields.items())


class StreamOptions(Schema):
    """`stream_options` of OpenAI, with additions of vLLM and of this server.

    Attributes:
        include_usage: send the usage in a last chunk without choices.
        continuous_usage_stats: if `include_usage` is true, also send the usage so far in each
            chunk, as vLLM does.
        include_obfuscation: only False is accepted, because no chunk is padded.
        include_draft_trees: send the draft tree and the accepted path of each iteration.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None
    include_draft_trees: bool | None = None


if TYPE_CHECKING:  # fields that follow from a table have no static types
    OptionsSchema = Schema
else:
    OptionsSchema = create_model(
        "OptionsSchema",
        __base__=Schema,
        **{name: request_field(OPTIONS[name]) for name in REQUEST_OPTIONS},
    )


def given_options(request: Schema) -> Options:
    """Return the decoding options that a request sets; the seed -1 chooses a new one."""
    options = cast(Options, request.model_dump(include=REQUEST_OPTIONS, exclude_none=True))
    if (seed := options.pop("seed", None)) is not None and seed != NEW_SEED:
        options["seed"] = seed % SEEDS
    return options


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class Function(Schema):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTyped(Schema):
    type: Literal["function"]


class Tool(FunctionTyped):
    """A tool; only functions are supported."""

    function: Function


class NamedFunction(Schema):
    name: str


class NamedToolChoice(FunctionTyped):
    function: NamedFunction


class FunctionSubset(Schema):
    """The functions of `tools` that the model may call."""

    mode: Literal["auto", "required"]
    tools: Items[NamedToolChoice] = Field(min_length=1)


class SubsetToolChoice(Schema):
    type: Literal["allowed_tools"]
    allowed_tools: FunctionSubset


CallMode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class AllowedTools:
    """The calls that a message may have."""

    functions: Sequence[Mapping[str, Any]] = ()  # functions in the form of chat templates
    must_call: bool = False  # whether the message must consist of calls
    parallel: bool = True  # whether the message may have several enforced calls

    @property
    def strict(self) -> bool:
        """Whether the arguments of a function must follow its schema."""
        return any(tool["function"].get("strict") for tool in self.functions)


def allowed_tools(
    functions: Sequence[Function],
    choice: CallMode | NamedFunction | None,
    *,
    among: Sequence[str] | None = None,
    parallel: bool | None = None,
) -> AllowedTools:
    """Return the calls that a request allows; a named function is called once.

    With `among`, the model sees the functions of these names alone.

    Raises an APIError if two tools have the same name, or the choice does not fit the tools.
    """
    if choice == "none":
        return AllowedTools()
    names = [function.name for function in functions]
    if repeated := next((name for name, count in Counter(names).items() if count > 1), None):
        raise bad_request(f"two tools have the same name {repeated!r}; rename one", "tools")
    must_call, several = choice not in (None, "auto"), parallel is not False
    if isinstance(choice, NamedFunction):
        among, several = [choice.name], False
    if not names and (must_call or among):
        advice = "add tools or remove tool_choice"
        message = f"tool_choice needs tools and the request has none; {advice}"
        raise bad_request(message, "tool_choice")
    for name in among or ():
        if name not in names:
            raise bad_request(
                f"tool_choice names the function {name!r}, which is not in tools; the functions "
                f"are {', '.join(names)}",
                "tool_choice",
            )
    allowed = [
        {"type": "function", "function": x.model_dump(exclude={"type"}, exclude_none=True)}
        for x in functions
        if among is None or x.name in among
    ]
    return AllowedTools(allowed, must_call=must_call, parallel=several)


class TextContent(Schema):
    """A text in a message; the protocols differ in the types that a text may have."""

    text: str

    def template(self) -> dict[str, Any]:
        return text_part(self.text)


CacheTime = Literal["30m", "12h"]
"""OpenAI's times for which beginnings of prompts are cached."""


class CacheBreakpoint(Schema):
    mode: Literal["explicit"]
    ttl: CacheTime | None = None


class Breakable(Schema):
    """A part of OpenAI's messages that may mark the end of a prefix to cache.

    Clients of several APIs do it in Anthropic's form, too. This server caches all prompts anyway.
    """

    prompt_cache_breakpoint: CacheBreakpoint | None = None
    cache_control: dict[str, Any] | None = None


class CacheOptions(Schema):
    mode: Literal["implicit", "explicit"] | None = None
    ttl: CacheTime | None = None


class PromptCaching(Schema):
    """OpenAI's fields for the caching of prompts, which change nothing here."""

    prompt_cache_key: str | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None


class TextPart(TextContent, Breakable):
    type: Literal["text"]


class ImageURL(Schema):
    url: str
    # These change nothing here.
    detail: Literal["auto", "low", "high", "original"] | None = None
    media_type: str | None = None


class ImagePart(Breakable):
    type: Literal["image_url"]
    image_url: ImageURL

    def template(self) -> dict[str, Any]:
        """Return the part in the form of prompts; an APIError if its bytes are elsewhere."""
        return embedded_image(self.image_url.url, "image_url")


def embedded_image(url: str | None, param: str) -> dict[str, Any]:
    """Return the part of a prompt for an image in a `data:` URL.

    Raises an APIError for other URLs, paths and ids: what they name may be a secret of the server
    or of its network, so nothing is read or fetched for a request.
    """
    if url is None or not url.startswith(DATA_URL):
        advice = "send the bytes in base64, in a data: URL where the API has URLs"
        raise bad_request(f"images are never fetched or opened by this server; {advice}", param)
    return image_part(url)


def base64_image(data: str) -> dict[str, Any]:
    """Return the part of a prompt for the bytes of an image in base64."""
    return image_part(f"{DATA_URL};base64,{data}")


class CalledFunction(NamedFunction):
    """A called function; the arguments are a JSON object, as text."""

    arguments: str
    parsed_arguments: Any = None  # added by OpenAI's package


class MessageToolCall(Schema):
    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None  # left there by clients that join the chunks of a stream


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Items[MessageToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None  # the name of a participant, for chat templates that show it
    type: Literal["text"] | None = None  # sent by lm-eval
    # Clients add these to messages that they send back, and they change nothing here.
    annotations: list[Any] | None = None
    parsed: Any = None
    reasoning_details: list[Any] | None = None
    copilot_cache_control: dict[str, Any] | None = None
    cot_id: str | None = None
    cot_summary: Any = None

    @property
    def thoughts(self) -> str | None:
        """The reasoning, for which clients have two names."""
        return self.reasoning if self.reasoning_content is None else self.reasoning_content

    def template(self) -> dict[str, Any]:
        """Convert it for chat templates; an APIError if it does not fit its role."""
        self._check()
        content: Any = self.content or ""
        if not isinstance(content, str):
            content = content_of([part.template() for part in content])
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content,
        }
        message |= self.model_dump(include={"tool_call_id", "name"}, exclude_none=True)
        if (reasoning := self.thoughts) is not None:
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            calls = [(call.id, call.function) for call in self.tool_calls]
            message["tool_calls"] = [
                function_call(i, x.name, parsed_arguments(x.arguments)) for i, x in calls
            ]
        return message

    def _check(self) -> None:
        error = None
        if self.role != "assistant" and (self.tool_calls or self.thoughts is not None):
            error = "must not have tool_calls or reasoning_content, which only assistants have"
        elif self.role == "tool" and self.tool_call_id is None:
            error = "needs tool_call_id, the id of the call that it answers"
        elif self.role != "tool" and self.tool_call_id is not None:
            error = "must not have tool_call_id, which only messages with the role tool have"
        elif self.content is None and not self.tool_calls:
            error = "needs content"
        if error is not None:
            raise bad_request(f"a message with the role {self.role} {error}", "messages")


def function_call(id: str, name: str, arguments: dict[str, Any] | str) -> dict[str, Any]:
    """Return a call in OpenAI's form, in which chat templates read the arguments as an object."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def parsed_arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a call; raises an APIError if the text is not a JSON object."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad_request("the arguments of a tool call must be a JSON object, as text", "messages")
    return arguments


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""OpenAI's degrees of reasoning; this server knows on and off."""
Verbosity = Literal["low", "medium", "high"]
"""OpenAI's lengths of answers, which only its own models know."""


def thinks(effort: ReasoningEffort) -> bool:
    return effort not in ("none", "minimal")


ANY_OBJECT: dict[str, Any] = {"type": "object"}


class PlainFormat(Schema):
    """Text or JSON; a schema beside the second, which other servers know, is enforced."""

    type: Literal["text", "json_object"]
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class NamedSchema(Schema):
    """A JSON schema, which is always enforced, whatever the value of `strict`."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JSONSchemaFormat(Schema):
    type: Literal["json_schema"]
    json_schema: NamedSchema


AnyFormat = PlainFormat | JSONSchemaFormat
ResponseFormat = Annotated[AnyFormat, Field(discriminator="type")]


class StructuredOutputs(Schema):
    """vLLM's field for structured output; exactly one of its own fields must be set.

    Attributes:
        json_schema: a JSON schema; vLLM calls it `json`.
        regex: a regular expression that the whole answer matches.
        choice: the answer is one of these texts.
        grammar: a grammar in the Lark format or in GBNF, the format of llama.cpp.
        json_object: any JSON object.
    """

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: LongList[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: Literal[True] | None = None

    def to_grammar(self) -> Grammar:
        """Return the grammar of the answer; raises an APIError unless exactly one field is set."""
        if len(self.model_dump(exclude_none=True)) != 1:
            names = "json, regex, choice, grammar and json_object"
            message = f"structured_outputs must have exactly one of {names}"
            raise bad_request(message, "structured_outputs")
        if self.regex is not None:
            return Grammar.regex(self.regex)
        if self.choice is not None:
            return Grammar.choice(self.choice)
        if self.grammar is not None:
            return Grammar.lark_or_gbnf(self.grammar)
        return Grammar.json(ANY_OBJECT if self.json_schema is None else self.json_schema)


def format_grammar(response_format: AnyFormat | None) -> Grammar | None:
    """Return the grammar of answers in a format; None for free text."""
    if response_format is None or response_format.type == "text":
        return None
    schema: Any = response_format.json_schema
    if isinstance(schema, NamedSchema):
        schema = schema.json_schema
    return Grammar.json(ANY_OBJECT if schema is None else schema)


class DecodingSchema(OptionsSchema):
    """The decoding fields of a request.

    `method` and `budget` mean the same as on the command line: they change the speed, never the
    text.
    """

    model: str | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None  # llama.cpp's: streams say how much of a prompt has run
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None  # identifies the client's own user; it changes nothing here
    # vllm-router adds these fields to every request, with values that change nothing.
    no_stop_trim: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None
    return_hidden_states: Literal[False] | None = None

    def options(self) -> Options:
        """Return the decoding options; an APIError if a field of streams is set without one."""
        for name in ("stream_options", "return_progress"):
            if getattr(self, name) and not self.stream:
                advice = f"set stream to true or remove {name}"
                raise bad_request(f"{name} applies to streams only; {advice}", name)
        options = given_options(self)
        if self.ignore_eos:
            options["stop_token_ids"] = ()
        return options

    def grammar(self) -> tuple[Grammar, str] | None:
        """Return the grammar that the request asks for, and its field; None for free text.

        Raises an APIError if both fields ask for a grammar, or `structured_outputs` for several.
        """
        grammar = format_grammar(self.response_format)
        if self.structured_outputs is None:
            return None if grammar is None else (grammar, "response_format")
        if grammar is not None:
            raise bad_request(
                "response_format and structured_outputs both set the form of the answer; remove "
                "one of them",
                "structured_outputs",
            )
        return self.structured_outputs.to_grammar(), "structured_outputs"
