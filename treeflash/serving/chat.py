"""`/v1/chat/completions`: OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from pydantic import Field

from treeflash.serving.engine import AnswerUpdate, Completion
from treeflash.serving.errors import bad_request
from treeflash.serving.message_parser import MessageParser, PartChange, calls_of, text_of
from treeflash.serving.models import ModelPool
from treeflash.serving.schemas import (
    MAX_LOG_PROBS,
    MAX_TOOLS,
    AllowedTools,
    CallMode,
    DecodingSchema,
    Items,
    LongList,
    Message,
    Metadata,
    NamedToolChoice,
    PromptCaching,
    ReasoningEffort,
    SubsetToolChoice,
    Tool,
    Verbosity,
    allowed_tools,
    function_call,
    thinks,
)
from treeflash.serving.service import Conversation, Service
from treeflash.serving.streaming import ChoicesFormatter, log_prob_entries, respond
from treeflash.text.options import Options
from treeflash.text.stream import Assembler

ToolChoice = Annotated[NamedToolChoice | SubsetToolChoice, Field(discriminator="type")]


class ChatRequest(DecodingSchema, PromptCaching):
    messages: Items[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOG_PROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    tools: Items[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: CallMode | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    # These fields of OpenAI's change nothing here.
    metadata: Metadata | None = None
    modalities: LongList[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    verbosity: Verbosity | None = None
    # vllm-router adds these too.
    separate_reasoning: Literal[True] | None = None
    stream_reasoning: Literal[True] | None = None
    include_reasoning: Literal[True] | None = None

    def conversation(self) -> Conversation:
        """Build the conversation; an APIError if a message or a tool is invalid."""
        effort = self.reasoning_effort
        return Conversation(
            messages=[message.template() for message in self.messages],
            template_args=self.chat_template_kwargs or {},
            reasoning=None if effort is None else (thinks(effort), "reasoning_effort"),
            tools=self._allowed_tools(),
            continues=self._continues(),
            grammar=self.grammar(),
        )

    def _allowed_tools(self) -> AllowedTools:
        choice, among = self.tool_choice, None
        if isinstance(choice, SubsetToolChoice):
            among = [tool.function.name for tool in choice.allowed_tools.tools]
            choice = choice.allowed_tools.mode
        return allowed_tools(
            [tool.function for tool in self.tools or ()],
            choice.function if isinstance(choice, NamedToolChoice) else choice,
            among=among,
            parallel=self.parallel_tool_calls,
        )

    def _continues(self) -> bool:
        """Return whether the last message begins the answer, by vLLM's two fields."""
        continues = self.continue_final_message is True
        if continues == (self.add_generation_prompt is not False):
            raise bad_request(
                "add_generation_prompt must be false if continue_final_message is true, and not "
                "otherwise",
                "add_generation_prompt",
            )
        last = self.messages[-1]
        if continues and (last.role != "assistant" or not last.content or last.tool_calls):
            raise bad_request(
                "continue_final_message needs a last message of the assistant with text only",
                "continue_final_message",
            )
        return continues

    def options(self) -> Options:
        """Return the decoding options; an APIError if two fields contradict each other."""
        options = super().options()
        if self.max_completion_tokens is not None:
            if options.get("max_tokens") not in (None, self.max_completion_tokens):
                raise bad_request(
                    "max_tokens and max_completion_tokens are aliases but have different values, "
                    f"{options['max_tokens']} and {self.max_completion_tokens}; send one of them",
                    "max_tokens",
                )
            options["max_tokens"] = self.max_completion_tokens
        if self.top_logprobs is not None and not self.logprobs:
            message = "top_logprobs requires logprobs; set logprobs to true or remove top_logprobs"
            raise bad_request(message, "top_logprobs")
        if self.logprobs:
            options["log_probs"] = self.top_logprobs or 0
        return options


def add_routes(app: FastAPI, pool: ModelPool) -> None:

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: HTTPRequest) -> Response:
        async with pool.use(request.model, http) as service:
            completion, parsers = await request.conversation().start(
                service, http, request.options(), answers=request.n or 1
            )
            answer = ChatFormatter(service, request, completion, parsers)
            return await respond(service, http, completion, answer, request.stream)


class ChatFormatter(ChoicesFormatter):
    """Writes a completion in the form of chat completions."""

    id_prefix = "chatcmpl"
    body_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    empty_choice: ClassVar = {"delta": {}}

    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        completion: Completion,
        parsers: Sequence[MessageParser],
    ) -> None:
        super().__init__(service, request, completion)
        self._parsers = parsers
        self._logprobs = request.logprobs

    def choice(self, index: int, answer: Assembler) -> dict[str, Any]:
        parser = self._parsers[index]
        parser.read(answer.chunks)
        message: dict[str, Any] = {"role": "assistant", "content": parser.content}
        if parser.calls:
            message["content"] = parser.content or None
            message["tool_calls"] = [function_call(**vars(call)) for call in parser.calls]
        if parser.reasoning:
            message["reasoning_content"] = parser.reasoning
        entries = log_prob_entries(self._tokenizer, answer.chunks)
        return {
            "index": index,
            "message": message,
            "finish_reason": _finish_reason(answer.finish_reason, parser),
            "logprobs": {"content": entries} if self._logprobs else None,
        }

    def chunk_choices(self, update: AnswerUpdate) -> Iterator[dict[str, Any]]:
        """Yield the role before the first tokens of an answer; then what the update adds to it."""
        if update.iteration == 0:
            role = {"role": "assistant", "content": ""}
            yield {"index": update.index, "delta": role, "finish_reason": None}
        parser, chunk = self._parsers[update.index], update.chunk
        choice: dict[str, Any] = {
            "index": update.index,
            "delta": _delta(parser, list(parser.feed(chunk))),
            "finish_reason": _finish_reason(chunk.finish_reason, parser),
        }
        if self._logprobs:
            choice["logprobs"] = {"content": log_prob_entries(self._tokenizer, [chunk])}
        choice |= self.draft_tree(update)
        # The beginning of a call says nothing yet.
        if choice.keys() & {"logprobs", "draft_tree"} or choice["delta"] or choice["finish_reason"]:
            yield choice


def _finish_reason(reason: str | None, parser: MessageParser) -> str | None:
    """Return `tool_calls` if a message with calls has ended, else the loop's reason."""
    return "tool_calls" if reason == "stop" and parser.calls else reason


def _delta(parser: MessageParser, changes: Sequence[PartChange]) -> dict[str, Any]:
    """Return the additions of a chunk to a message, in OpenAI's form."""
    delta: dict[str, Any] = {}
    if content := text_of(changes, "content"):
        delta["content"] = content
    if reasoning := text_of(changes, "reasoning"):
        delta["reasoning_content"] = reasoning
    if calls := calls_of(changes):
        first = len(parser.calls) - len(calls)
        delta["tool_calls"] = [
            {"index": first + i, **function_call(**vars(call))} for i, call in enumerate(calls)
        ]
    return delta
