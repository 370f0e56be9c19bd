"""What endpoints share: the engine, the defaults, and how a request becomes a completion."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fastapi import Request as HTTPRequest

from treeflash.decoding import Request
from treeflash.decoding.constraints import Constraint
from treeflash.serving.completion import Completion, Usage
from treeflash.serving.engine import Engine
from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.grammars import GrammarCompiler
from treeflash.serving.response_templates import ResponseTemplate
from treeflash.serving.schemas import DecodingSchema
from treeflash.serving.settings import Settings
from treeflash.text.options import Options, stop_strings
from treeflash.text.tokenizer import Tokenizer, check_unicode

MAX_TOKENS = 2048
"""New tokens of an answer if neither the request nor the server says how many."""


@dataclass(frozen=True, eq=False)
class Service:
    """One loaded pair, and how it is offered.

    Attributes:
        engine: decodes.
        settings: limits and access.
        defaults: decoding options of requests that do not have them.
        names: of the model; the first is reported, each is accepted.
        created: when the server was started, seconds since 1970.
    """

    engine: Engine
    settings: Settings
    defaults: Options
    names: tuple[str, ...]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's."""
        return self.engine.model.tokenizer

    @cached_property
    def response_template(self) -> ResponseTemplate | None:
        """How the model writes reasoning and tool calls, if that is known."""
        return ResponseTemplate.of(self.engine.model)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Makes constraints of grammars."""
        return GrammarCompiler(self.tokenizer, self.engine.model.backend.vocab_size)

    def check_model(self, name: str | None) -> None:
        """Raise an APIError if a request names another model."""
        if name is not None and name not in self.names:
            raise APIError(
                404,
                f"the model {name!r} does not exist; this server has {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], template_args: Mapping[str, Any]
    ) -> list[int]:
        """The token ids of a conversation, with the server's system message if it has none.

        Raises:
            PromptError: the chat template rejects it.
        """
        system = self.defaults.get("system")
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        variables = {**(self.defaults.get("template_args") or {}), **template_args}
        return await asyncio.to_thread(self.tokenizer.chat, messages, variables)

    async def encode_text(self, text: str) -> list[int]:
        """The token ids of plain text.

        Raises:
            PromptError: it is not valid Unicode.
        """
        check_unicode(text)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    def submit(
        self,
        http: HTTPRequest,
        body: DecodingSchema,
        prompt_ids: Sequence[int],
        constraint: Callable[[], Constraint] | None = None,
    ) -> Completion:
        """Generate the answers that a request asks for.

        Args:
            http: the request, for its salt.
            body: the same.
            prompt_ids: the prompt.
            constraint: makes a constraint for each answer.

        Raises:
            ConfigError, PromptError, APIError: see `Engine.submit`.
        """
        answers = body.n or 1
        if answers > self.settings.max_choices:
            raise APIError(
                BAD_REQUEST,
                f"n is {answers}, and this server gives at most {self.settings.max_choices} "
                "answers to a request",
                param="n",
            )
        options: Options = {"max_tokens": MAX_TOKENS, **self.defaults, **body.options()}
        config = self.engine.model.decode_config(options)
        seed = config.sampling.seed if "seed" in options else secrets.randbits(32)
        requests = [
            Request(
                prompt_ids=prompt_ids,
                config=replace(config, sampling=replace(config.sampling, seed=(seed + i) % 2**64)),
                constraint=None if constraint is None else constraint(),
                salt=http.state.salt,
            )
            for i in range(answers)
        ]
        return self.engine.submit(requests, stop_strings(options))


def usage(counts: Usage) -> dict[str, Any]:
    """OpenAI's usage, with the tokens of the draft trees beside it."""
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        "draft_tokens_details": {
            "drafted_tokens": counts.drafted_tokens,
            "accepted_tokens": counts.accepted_tokens,
            "iterations": counts.iterations,
        },
    }


def response_id(prefix: str) -> str:
    """A name for a response."""
    return f"{prefix}-{secrets.token_hex(12)}"
