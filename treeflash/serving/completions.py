"""`/v1/completions`: OpenAI's completions, of plain text without a chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from treeflash.serving.engine import AnswerUpdate, Completion, Usage
from treeflash.serving.errors import bad_request
from treeflash.serving.models import ModelPool
from treeflash.serving.schemas import MAX_ITEMS, MAX_LOG_PROBS, DecodingSchema, LongList, TokenId
from treeflash.serving.service import Service
from treeflash.serving.streaming import ChoicesFormatter, respond, token_name
from treeflash.text.generation import TokenLogProb
from treeflash.text.options import Options
from treeflash.text.prompt import EncodedPrompt
from treeflash.text.stream import Assembler, Chunk

TokenIds = Annotated[LongList[TokenId], Field(min_length=1)]


class CompletionRequest(DecodingSchema):
    """The body of a request; with several prompts, each has `n` choices, in order.

    `echo` puts the prompt before each answer, with its log probabilities if `logprobs` is set. Only
    with `echo` may `max_tokens` be 0. With a `suffix`, the answer is what fits between a prompt and
    the suffix.
    """

    prompt: (
        str
        | TokenIds
        | Annotated[LongList[str], Field(min_length=1)]
        | Annotated[LongList[TokenIds], Field(min_length=1)]
    )
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOG_PROBS)
    echo: bool | None = None
    suffix: str | None = None
    best_of: Literal[1] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _limit_prompts(cls, prompt: Any) -> Any:
        """Count the prompts before each of the types is tried."""
        if isinstance(prompt, list) and len(prompt) > MAX_ITEMS and not isinstance(prompt[0], int):
            raise PydanticCustomError("too_long", "a list has at most {n} items", {"n": MAX_ITEMS})
        return prompt

    def options(self) -> Options:
        options = super().options()
        if self.logprobs is not None:
            options["log_probs"] = self.logprobs
        if self.max_tokens == 0:
            if not self.echo:
                problem = "max_tokens is 0, which is only of use with echo"
                raise bad_request(f"{problem}; set echo to true or raise max_tokens", "max_tokens")
            options["max_tokens"] = 1  # it is generated, and left out of the answer
        return options

    def before(self, prompt: str | list[int]) -> str:
        """Return the text before the gap that the answer fills; an APIError if there is none."""
        if not isinstance(prompt, str):
            raise bad_request("suffix needs a prompt that is a text, not token ids", "suffix")
        if self.echo:
            raise bad_request("suffix and echo exclude each other; remove one of them", "suffix")
        return prompt

    def prompts(self) -> list[str] | list[list[int]]:
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def add_routes(app: FastAPI, pool: ModelPool) -> None:

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: HTTPRequest) -> Response:
        async with pool.use(request.model, http) as service:
            completion = await start(request, http, service)
            answer = CompletionFormatter(service, request, completion)
            return await respond(service, http, completion, answer, request.stream)

    async def start(request: CompletionRequest, http: HTTPRequest, service: Service) -> Completion:
        given, answers = request.prompts(), request.n or 1
        service.check_answers(len(given), answers)  # before each is encoded
        options = request.options()
        prompts = []
        for prompt in given:
            if request.suffix:
                prompts.append(await service.encode_gap(request.before(prompt), request.suffix))
                options.setdefault("stop_token_ids", service.infill.stop_token_ids)
            elif isinstance(prompt, str):
                prompts.append(await service.encode(prompt))
            else:
                prompts.append(EncodedPrompt(prompt))
        grammar = request.grammar()
        constraint = None if grammar is None else await service.compile(*grammar)
        return service.start(
            http,
            options,
            prompts,
            constraint,
            answers=answers,
            scores_prompt=bool(request.echo) and request.logprobs is not None,
        )


class CompletionFormatter(ChoicesFormatter):
    """Writes a completion in the form of `/v1/completions`."""

    id_prefix = "cmpl"
    body_object = chunk_object = "text_completion"
    empty_choice: ClassVar = {"text": "", "logprobs": None}

    def __init__(
        self, service: Service, request: CompletionRequest, completion: Completion
    ) -> None:
        super().__init__(service, request, completion)
        self._has_log_probs = request.logprobs is not None
        self._prompts = request.prompts() if request.echo else None
        self._prompt_only = request.max_tokens == 0
        self._offsets = [0] * len(completion.answers)

    @property
    def counts(self) -> Usage:
        counts = super().counts
        return replace(counts, completion_tokens=0) if self._prompt_only else counts

    def choice(self, index: int, answer: Assembler) -> dict[str, Any]:
        return self._choice(index, answer.chunks, answer.finish_reason, begins=True)

    def chunk_choices(self, update: AnswerUpdate) -> Iterator[dict[str, Any]]:
        chunk, begins = update.chunk, update.iteration == 0
        choice = self._choice(update.index, [chunk], chunk.finish_reason, begins=begins)
        yield choice | self.draft_tree(update)

    def _choice(
        self, index: int, chunks: Sequence[Chunk], finish_reason: str | None, *, begins: bool
    ) -> dict[str, Any]:
        """Return a part of an answer; the first part may begin with the prompt."""
        new = [] if self._prompt_only else chunks
        text = "".join(chunk.text for chunk in new)
        if begins and self._prompts is not None:
            prompt = self._prompts[index // self._completion.answers_per_prompt]
            text = (prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)) + text
        return {
            "index": index,
            "text": text,
            "logprobs": self._log_probs(index, new, begins) if self._has_log_probs else None,
            "finish_reason": "length" if self._prompt_only else finish_reason,
        }

    def _log_probs(self, index: int, chunks: Sequence[Chunk], begins: bool) -> dict[str, Any]:
        """Return four lists with an entry for each token; a prompt's first token has no values."""
        name, token_bytes = partial(token_name, self._tokenizer), self._tokenizer.token_bytes
        first: Sequence[int] = ()
        scored = [token for chunk in chunks for token in chunk.log_probs]
        if begins and self._prompts is not None:
            # The first answer to a prompt has the log probabilities for all of them.
            leader = self._completion.answers[index - index % self._completion.answers_per_prompt]
            first, rest = leader.prompt_ids[:1], leader.prompt_ids[1:]
            if (values := leader.chunks[0].step.prompt_log_probs) is not None:
                scored = TokenLogProb.of_tokens(rest, values) + scored
        ids = [*first, *(token.token_id for token in scored)]
        # A character that is cut into several tokens begins with the first of them.
        lengths = (sum(byte & 0xC0 != 0x80 for byte in token_bytes(token_id)) for token_id in ids)
        *offsets, self._offsets[index] = accumulate(lengths, initial=self._offsets[index])
        blank = [None] * len(first)
        # Beside the best tokens there is the token itself, as in OpenAI's API.
        best = ([*token.top, (token.token_id, token.log_prob)] for token in scored)
        return {
            "tokens": list(map(name, ids)),
            "token_logprobs": [*blank, *(token.log_prob for token in scored)],
            "top_logprobs": [*blank, *({name(i): x for i, x in row} for row in best)],
            "text_offset": offsets,
        }
