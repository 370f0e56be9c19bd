"""`/api/chat`, `/api/generate` and their neighbours: Ollama's API.

A stream has a JSON object in each line, and is the default. Durations are nanoseconds. A request
without a prompt loads a model, or puts it away if `keep_alive` is 0. The only model of a server
stays in memory, whatever `keep_alive` says.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from pydantic import Field, FiniteFloat, model_validator

from treeflash import __version__
from treeflash.serving.engine import Completion
from treeflash.serving.errors import bad_request
from treeflash.serving.message_parser import MessageParser, ToolCall, calls_of, text_of
from treeflash.serving.model_facts import ModelFacts
from treeflash.serving.models import ModelPool, ServedModel
from treeflash.serving.schemas import (
    ANY_OBJECT,
    MAX_LOG_PROBS,
    MAX_TOOLS,
    FunctionName,
    Items,
    LongList,
    Schema,
    StopString,
    Temperature,
    Tool,
    TopK,
    TopP,
    allowed_tools,
    base64_image,
    function_call,
    given_options,
    limits,
)
from treeflash.serving.service import Conversation, Service
from treeflash.serving.streaming import Formatter, json_line, log_prob_entries, respond
from treeflash.text.grammar import Grammar
from treeflash.text.options import Options
from treeflash.text.prompt import Content, content_of, text_part
from treeflash.text.stream import Chunk

STAYS = timedelta(days=365 * 100)
"""The time for which a model is loaded; Ollama says so of models that it does not unload."""
TAG = ":latest"
"""The tag that Ollama's clients may add to a model's name."""
NANOSECONDS = 1_000_000_000
UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
"""Seconds of each unit of a duration."""
NUMBER = r"\d+(?:\.\d*)?"
API_VERSION = "0.14.2"
"""The version of Ollama whose API this is. Applications refuse versions that lack what they use: VS
Code refuses all before 0.6.4."""


class OllamaSchema(Schema):
    """A JSON object whose empty fields are not set: clients in Go write all fields."""

    unset = (None, "", False, [])


class OllamaOptions(OllamaSchema):
    """`options` of a request; those that place a model on a machine change nothing here."""

    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    min_p: Annotated[float, limits("min_p")] | None = None
    seed: int | None = None  # seed of any sign: clients send -1 for a random one
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    num_predict: int | None = None  # 0 and negative numbers: the server's limit
    repeat_penalty: Annotated[float, limits("repetition_penalty")] | None = None
    presence_penalty: Annotated[float, limits("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, limits("frequency_penalty")] | None = None
    repeat_last_n: int | None = None  # 0 turns the penalties off; else they count the whole text
    # Only values that leave these out of sampling are accepted.
    mirostat: Literal[0] | None = None
    mirostat_eta: float | None = None
    mirostat_tau: float | None = None
    typical_p: Annotated[float, Field(ge=1, le=1)] | None = None
    tfs_z: Annotated[float, Field(ge=1, le=1)] | None = None
    penalize_newline: Literal[True] | None = None
    # The model was loaded when the server started.
    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_keep: int | None = None
    num_thread: int | None = None
    draft_num_predict: int | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    numa: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_whole_numbers(cls, fields: Any) -> Any:
        """Read 4096.0 as 4096: Ollama has one type for numbers of JSON, and clients rely on it."""
        if not isinstance(fields, dict):
            return fields
        return {
            name: int(x) if isinstance(x, float) and x.is_integer() else x
            for name, x in fields.items()
        }

    def decoding(self) -> Options:
        """Return the options under the names that they have here."""
        options = given_options(self)
        if self.seed is not None and self.seed < 0:
            options.pop("seed", None)
        if self.repeat_penalty is not None:
            options["repetition_penalty"] = self.repeat_penalty
        if self.repeat_last_n == 0:  # Ollama then penalises no token
            options["repetition_penalty"] = 1.0
            options["presence_penalty"] = options["frequency_penalty"] = 0.0
        if self.num_predict is not None and self.num_predict > 0:
            options["max_tokens"] = self.num_predict
        return options


class OllamaRequest(OllamaSchema):
    """The fields that both kinds of answers share."""

    model: str
    stream: bool | None = None  # True by default
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    keep_alive: FiniteFloat | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOG_PROBS)  # without `logprobs`: ignored
    # Ollama ignores these, too; clients of several APIs send them beside `options`.
    tool_choice: Any = None
    max_output_tokens: Any = None
    temperature: Any = None
    top_p: Any = None

    def asked(self) -> Options:
        options = Options() if self.options is None else self.options.decoding()
        if self.logprobs:
            options["log_probs"] = self.top_logprobs or 0
        return options

    def grammar(self) -> tuple[Grammar, str] | None:
        """Return the grammar of the answer and its field; None for free text."""
        if not self.format:
            return None
        return Grammar.json(ANY_OBJECT if self.format == "json" else self.format), "format"

    def seconds_to_stay(self) -> float | None:
        """Return how long the model stays in memory after the answer; None leaves it as it is.

        Raises an APIError if `keep_alive` is not a duration.
        """
        if self.keep_alive is None:
            return None
        seconds = duration(self.keep_alive)
        if seconds is None:
            message = f"keep_alive must be seconds or a text such as 5m, got {self.keep_alive!r}"
            raise bad_request(message, "keep_alive")
        return math.inf if seconds < 0 else seconds

    @property
    def reasoning(self) -> tuple[bool, str] | None:
        """The field `think` in the form of a `Conversation`."""
        return None if self.think is None else (bool(self.think), "think")


class OllamaFunction(Schema):
    """A called function, with its arguments as an object."""

    name: FunctionName
    arguments: dict[str, Any] = Field(default_factory=dict)
    description: str | None = None  # clients send it back
    index: int | None = None


class OllamaCall(Schema):
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None  # written by Open WebUI
    function: OllamaFunction


class OllamaMessage(Schema):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = ""
    thinking: str | None = None
    tool_calls: Items[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: LongList[str] | None = None  # in base64


class ChatRequest(OllamaRequest):
    messages: Items[OllamaMessage] = Field(default_factory=list)
    tools: Items[Tool] | None = Field(None, max_length=MAX_TOOLS)

    def conversation(self) -> Conversation:
        """Build the conversation; an APIError if its last message leaves nothing to answer."""
        last = self.messages[-1]
        if last.role == "assistant" and last.tool_calls:
            raise bad_request(
                "the last message is the assistant's, which the answer continues, so it must have "
                "no tool_calls; add their results, or remove it",
                "messages",
            )
        return Conversation(
            messages=_templates(self.messages),
            reasoning=self.reasoning,
            tools=allowed_tools([tool.function for tool in self.tools or ()], None),
            continues=last.role == "assistant",
            grammar=self.grammar(),
        )


class GenerateRequest(OllamaRequest):
    """A prompt that is a message of the user or, if it is `raw`, the beginning of a text."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    images: LongList[str] | None = None  # in base64
    suffix: str = ""  # the answer is what fits between the prompt and this text

    def conversation(self) -> Conversation:
        """Build a conversation of a system message, if there is one, and the prompt."""
        messages = [{"role": "user", "content": _content(self.prompt, self.images)}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return Conversation(messages=messages, reasoning=self.reasoning, grammar=self.grammar())

    async def start(self, service: Service, http: HTTPRequest) -> tuple[Completion, MessageParser]:
        """Start to generate the answer, and return the parser of its parts."""
        if not self.raw and not self.suffix:
            conversation = self.conversation()
            completion, (parser,) = await conversation.start(service, http, self.asked())
            return completion, parser
        if self.system or self.format or self.think or self.images:
            field = "suffix" if self.suffix else "raw"
            message = f"remove system, format, think and images, or {field}"
            raise bad_request(f"{field} has no template: {message}", field)
        options = self.asked()
        if self.suffix:
            encoded = await service.encode_gap(self.prompt, self.suffix)
            options["stop_token_ids"] = service.infill.stop_token_ids
        else:
            encoded = await service.encode(self.prompt)
        completion = service.start(http, options, [encoded])
        return completion, MessageParser(None, service.tokenizer)


class ShowRequest(OllamaSchema):
    model: str
    verbose: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_old_name(cls, fields: Any) -> Any:
        """Read the name where older clients write it."""
        if isinstance(fields, dict) and fields.get("name") and not fields.get("model"):
            return {"model" if key == "name" else key: x for key, x in fields.items()}
        return fields


def duration(value: float | str) -> float | None:
    """Return the seconds of a number, or of a text in Go's form such as `1h30m`; None for others.

    A number without a unit in a text is seconds too.
    """
    if not isinstance(value, str):
        return value
    sign = -1 if value.startswith("-") else 1
    number = value.removeprefix("-").removeprefix("+")
    parts = re.findall(rf"({NUMBER})({'|'.join(UNITS)})", number)
    if parts and "".join(map("".join, parts)) == number:
        return sign * sum(float(count) * UNITS[unit] for count, unit in parts)
    return sign * float(number) if re.fullmatch(NUMBER, number) else None


def _content(text: str, images: Sequence[str] | None) -> Content:
    """Return the content of a message: its images, then its text."""
    return content_of([*map(base64_image, images or ()), text_part(text)])


def _templates(messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    """Convert messages to what chat templates read.

    Ollama's calls have no ids: the results follow in the order of the calls.
    """
    templates: list[dict[str, Any]] = []
    waiting: list[str] = []
    for message in messages:
        content = _content(message.content or "", message.images)
        template: dict[str, Any] = {"role": message.role, "content": content}
        if message.thinking:
            template["reasoning_content"] = message.thinking
        if message.tool_calls:
            first = len(templates)
            waiting = [call.id or f"call_{first}_{i}" for i, call in enumerate(message.tool_calls)]
            template["tool_calls"] = [
                function_call(id, call.function.name, call.function.arguments)
                for id, call in zip(waiting, message.tool_calls, strict=True)
            ]
        if message.role == "tool":
            if not waiting and message.tool_call_id is None:
                raise bad_request("a message with the role tool answers no call", "messages")
            template["tool_call_id"] = answered = message.tool_call_id or waiting[0]
            waiting = [call for call in waiting if call != answered]
            if message.tool_name is not None:
                template["name"] = message.tool_name
        templates.append(template)
    return templates


def add_routes(app: FastAPI, pool: ModelPool) -> None:

    def use(request: OllamaRequest, http: HTTPRequest) -> AbstractAsyncContextManager[Service]:
        return pool.use(_without_tag(request.model), http, request.seconds_to_stay())

    async def only_load(
        request: OllamaRequest, http: HTTPRequest, empty: Mapping[str, Any]
    ) -> Response:
        """Answer a request without a prompt, which loads the model or puts it away."""
        reason = "load"
        if pool.unloads and request.seconds_to_stay() == 0:
            pool.put_away(_without_tag(request.model))
            reason = "unload"
        else:
            async with use(request, http):
                pass
        head = {"model": request.model, "created_at": _time()}
        return JSONResponse({**head, **empty, "done": True, "done_reason": reason})

    @app.post("/api/chat")
    async def chat(request: ChatRequest, http: HTTPRequest) -> Response:
        if not request.messages:
            return await only_load(request, http, {"message": {"role": "assistant", "content": ""}})
        started = time.perf_counter()
        async with use(request, http) as service:
            load_seconds = time.perf_counter() - started
            conversation = request.conversation()
            completion, (parser,) = await conversation.start(service, http, request.asked())
            answer = OllamaFormatter(service, request, completion, parser, load_seconds)
            return await respond(service, http, completion, answer, request.stream is not False)

    @app.post("/api/generate")
    async def generate(request: GenerateRequest, http: HTTPRequest) -> Response:
        if not request.prompt and not request.suffix:
            return await only_load(request, http, {"response": ""})
        started = time.perf_counter()
        async with use(request, http) as service:
            load_seconds = time.perf_counter() - started
            completion, parser = await request.start(service, http)
            answer = OllamaFormatter(service, request, completion, parser, load_seconds)
            return await respond(service, http, completion, answer, request.stream is not False)

    @app.get("/api/tags")
    def models() -> dict[str, Any]:
        return {"models": [_description(x, name) for x in pool.models for name in x.spec.names]}

    @app.get("/api/ps")
    def loaded() -> dict[str, Any]:
        return {"models": [found for model in pool.models for found in _in_memory(model)]}

    @app.post("/api/show")
    def show(request: ShowRequest) -> dict[str, Any]:
        model = pool.find(_without_tag(request.model))
        facts = model.facts
        return {
            "details": _details(facts),
            "modified_at": _time(model.created),
            "template": facts.chat_template,
            "model_info": {
                "general.architecture": facts.family,
                "general.basename": _without_tag(request.model),
                "general.parameter_count": facts.parameters,
                f"{facts.family}.context_length": facts.context,
            },
            "capabilities": facts.capabilities,
        }

    @app.get("/api/version")
    def version() -> dict[str, str]:
        return {"version": API_VERSION, "treeflash": __version__}


def _without_tag(name: str) -> str:
    return name[: -len(TAG)] if name.lower().endswith(TAG) else name


def human_number(count: int) -> str:
    """Write a number of parameters as Ollama does, which applications read again."""
    for size, unit, decimals in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= size:
            text = f"{count / size:.{decimals}f}"
            return f"{count // size if count % size == 0 else text}{unit}"
    return str(count)


def _details(facts: ModelFacts) -> dict[str, Any]:
    """Describe the target as Ollama describes a model's file."""
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": facts.family,
        "families": [facts.family],
        "parameter_size": "" if facts.parameters is None else human_number(facts.parameters),
        "quantization_level": facts.precision,
    }


def _description(model: ServedModel, name: str) -> dict[str, Any]:
    facts = model.facts
    # The digest is a hash of what applications remember of a model by its digest.
    described = model.name, facts.family, facts.parameters, facts.capabilities
    return {
        "name": name,
        "model": name,
        "modified_at": _time(model.created),
        "size": facts.nbytes,
        "digest": hashlib.sha256(json.dumps(described).encode()).hexdigest(),
        "details": _details(facts),
    }


def _in_memory(model: ServedModel) -> Iterator[dict[str, Any]]:
    """Describe a model under each of its names if it is in memory."""
    stay, service = model.stay, model.service
    if stay is None or service is None:
        return
    on_cpu = service.engine.model.backend.device.startswith("cpu")
    for name in model.spec.names:
        found = _description(model, name)
        yield {
            **found,
            "expires_at": _time(min(stay.ends_at, model.created + STAYS.total_seconds())),
            "size_vram": 0 if on_cpu else found["size"],
            "context_length": model.facts.context,
        }


def _time(seconds: float | None = None) -> str:
    """Format seconds since 1970, or now, as RFC 3339 has it."""
    moment = datetime.fromtimestamp(time.time() if seconds is None else seconds, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


class OllamaFormatter(Formatter):
    """Writes a completion of one answer in the form of `/api/chat` or of `/api/generate`.

    `load_seconds` is how long the request waited for its model.
    """

    def __init__(
        self,
        service: Service,
        request: OllamaRequest,
        completion: Completion,
        parser: MessageParser,
        load_seconds: float,
    ) -> None:
        self._tokenizer, self._completion, self._parser = service.tokenizer, completion, parser
        self._model, self._log_probs = request.model, request.logprobs
        self._is_chat = isinstance(request, ChatRequest)
        self._load_seconds = load_seconds

    def body(self) -> dict[str, Any]:
        parser, chunks = self._parser, self._completion.answers[0].chunks
        parser.read(chunks)
        calls = list(map(_call, parser.calls))
        part = self._part(parser.content, parser.reasoning, calls, chunks, done=True)
        return part | self._end()

    async def frames(self) -> AsyncIterator[bytes]:
        async for update in self._completion:
            changes = list(self._parser.feed(update.chunk))
            text, reasoning = text_of(changes, "content"), text_of(changes, "reasoning")
            calls = list(map(_call, calls_of(changes)))
            if text or reasoning or calls or self._log_probs:
                yield json_line(self._part(text, reasoning, calls, [update.chunk], done=False))
        yield json_line(self._part("", "", [], [], done=True) | self._end())

    def _part(
        self,
        text: str,
        reasoning: str,
        calls: Sequence[dict[str, Any]],
        chunks: Sequence[Chunk],
        *,
        done: bool,
    ) -> dict[str, Any]:
        """Return the object for a part of the answer, whose tokens are in `chunks`."""
        if self._is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            message |= {"thinking": reasoning} if reasoning else {}
            message |= {"tool_calls": list(calls)} if calls else {}
            part: dict[str, Any] = {"message": message}
        else:
            part = {"response": text} | ({"thinking": reasoning} if reasoning else {})
        if self._log_probs and chunks:
            part["logprobs"] = log_prob_entries(self._tokenizer, chunks)
        return {"model": self._model, "created_at": _time(), **part, "done": done}

    def _end(self) -> dict[str, Any]:
        """Return the reason for the end, the counts and the durations."""
        (answer,), counts = self._completion.answers, self._completion.usage
        first, *others = (sum(chunk.step.seconds.values()) for chunk in answer.chunks)
        return {
            "done_reason": answer.finish_reason,
            "total_duration": _nanoseconds(self._load_seconds + self._completion.seconds),
            "load_duration": _nanoseconds(self._load_seconds),
            "prompt_eval_count": counts.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first),
            "eval_count": counts.completion_tokens,
            "eval_duration": _nanoseconds(sum(others)),
        }


def _call(call: ToolCall) -> dict[str, Any]:
    """Write a call as Ollama does, with its arguments as an object."""
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": call.id, "function": function}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * NANOSECONDS)
