"""OpenAI's completions of plain text."""

from __future__ import annotations

from typing import Any

from servers import NAME

from protocols.chat import OpenAI, count
from protocols.protocol import Answer, Ask, LogProb, given


class Completions(OpenAI):
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
        return {"model": NAME, "prompt": ask.text, **fields}

    def ask(self, url: str, ask: Ask, *, stream: bool = False) -> Answer:
        answer = Answer()
        with self.client(url) as client:
            create = client.completions.create
            if stream:
                counted = {"stream": True, "stream_options": {"include_usage": True}}
                for chunk in create(**self.arguments(ask), **counted):
                    for choice in chunk.choices:
                        self._add(answer, choice)
                    if chunk.usage is not None:
                        count(answer, chunk.usage)
            else:
                whole = create(**self.arguments(ask))
                (choice,) = whole.choices
                self._add(answer, choice)
                count(answer, whole.usage)
        return answer

    def _add(self, answer: Answer, choice: Any) -> None:
        assert answer.reason is None, "a chunk follows the last one"
        answer.add(choice.text, None)
        answer.reason = choice.finish_reason
        if (found := choice.logprobs) is not None:
            columns = found.tokens, found.token_logprobs, found.top_logprobs
            answer.log_probs += [LogProb(*row) for row in zip(*columns, strict=True)]
