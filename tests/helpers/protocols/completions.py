"""OpenAI's completions of plain text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai

from protocols.chat import Choices
from protocols.protocol import Answer, Ask, LogProb, given


class Completions(Choices):
    path = "/v1/completions"
    can = frozenset({"stop", "schema", "log probabilities", "own token among the best",
                     "free length"})  # fmt: skip

    def body(self, ask: Ask) -> dict[str, Any]:
        fields = given(max_tokens=ask.max_tokens, logprobs=ask.log_probs)
        if ask.stop:
            fields["stop"] = ask.stop
        if ask.schema is not None:
            form = {"type": "json_schema", "json_schema": {"name": "n", "schema": ask.schema}}
            fields["response_format"] = form
        return {"model": ask.model, "prompt": ask.text, **fields}

    def method(self, client: openai.OpenAI) -> Callable[..., Any]:
        return client.completions.create

    def add(self, answer: Answer, choice: Any) -> None:
        answer.add(choice.text, None)
        if (found := choice.logprobs) is not None:
            columns = found.tokens, found.token_logprobs, found.top_logprobs
            answer.log_probs += [LogProb(*row) for row in zip(*columns, strict=True)]
