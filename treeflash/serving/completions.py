"""`/v1/completions`: text without a chat template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from pydantic import Field

from treeflash.serving.completion import Completion, Event
from treeflash.serving.schemas import MAX_LOG_PROBS, DecodingSchema, TokenId
from treeflash.serving.service import Service, response_id, usage
from treeflash.serving.streaming import DONE, CompletionStream, finish, frame
from treeflash.serving.structured_output import ResponseFormat, StructuredOutputs, answer_grammar
from treeflash.serving.trees import draft_tree
from treeflash.text.assembler import Assembler, Chunk
from treeflash.text.options import Options
from treeflash.text.tokenizer import Tokenizer


class CompletionRequest(DecodingSchema):
    """The body of a request."""

    prompt: str | Annotated[list[TokenId], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOG_PROBS)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def options(self) -> Options:
        """The decoding options that were given."""
        options = super().options()
        if self.logprobs is not None:
            options["log_probs"] = self.logprobs
        return options


def router(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HTTPRequest) -> Response:
        service.check_model(body.model)
        prompt = body.prompt
        prompt_ids = await service.encode_text(prompt) if isinstance(prompt, str) else prompt
        grammar = answer_grammar(body.response_format, body.structured_outputs)
        constraint = None
        if grammar is not None:
            constraint = await asyncio.to_thread(service.grammars.compile, *grammar)
        completion = service.submit(http, body, prompt_ids, constraint)
        answer = TextAnswer(service, body, completion)
        if body.stream:
            return CompletionStream(completion, answer.frames(), service.settings.keep_alive)
        await finish(completion, http)
        return JSONResponse(answer.whole())

    return routes


class TextAnswer:
    """Formats a completion."""

    def __init__(self, service: Service, body: CompletionRequest, completion: Completion) -> None:
        """Give the answer a name."""
        self._tokenizer: Tokenizer = service.tokenizer
        self._body = body
        self._completion = completion
        self._lengths = [0] * len(completion.texts)
        self._head = {
            "id": response_id("cmpl"),
            "object": "text_completion",
            "created": service.created,
            "model": service.names[0],
        }

    def whole(self) -> dict[str, Any]:
        """The response, once all answers are finished."""
        return {
            **self._head,
            "choices": [self._whole(i, text) for i, text in enumerate(self._completion.texts)],
            "usage": usage(self._completion.usage),
        }

    async def frames(self) -> AsyncIterator[bytes]:
        """The server-sent events of a stream."""
        async for event in self._completion:
            chunk = {**self._head, "choices": [self._part(event)]}
            if self._body.usage_in_chunks:
                chunk["usage"] = usage(self._completion.usage)
            yield frame(chunk)
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield frame({**self._head, "choices": [], "usage": usage(self._completion.usage)})
        yield DONE

    def _whole(self, index: int, text: Assembler) -> dict[str, Any]:
        content = "".join(chunk.text for chunk in text.chunks)
        return self._choice(index, content, text.chunks, text.finish_reason)

    def _part(self, event: Event) -> dict[str, Any]:
        chunk = event.chunk
        choice = self._choice(event.index, chunk.text, [chunk], chunk.finish_reason)
        options = self._body.stream_options
        if options is not None and options.include_draft_trees:
            choice["draft_tree"] = draft_tree(self._tokenizer, event)
        return choice

    def _choice(
        self, index: int, text: str, chunks: list[Chunk], finish_reason: str | None
    ) -> dict[str, Any]:
        found = None if self._body.logprobs is None else self._log_probs(index, chunks)
        return {"index": index, "text": text, "logprobs": found, "finish_reason": finish_reason}

    def _log_probs(self, index: int, chunks: list[Chunk]) -> dict[str, Any]:
        """Four lists with an entry for each token."""
        name = self._tokenizer.token_text
        tokens: list[str] = []
        chosen: list[float] = []
        best: list[dict[str, float]] = []
        offsets: list[int] = []
        for chunk in chunks:
            log_probs = chunk.step.log_probs
            assert log_probs is not None
            for i, token_id in enumerate(chunk.token_ids):
                tokens.append(name(token_id))
                chosen.append(float(log_probs.chosen[i]))
                pairs = zip(log_probs.tokens[i].tolist(), log_probs.values[i].tolist(), strict=True)
                best.append({name(token): value for token, value in pairs})
                offsets.append(self._lengths[index])
                self._lengths[index] += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": best,
            "text_offset": offsets,
        }
