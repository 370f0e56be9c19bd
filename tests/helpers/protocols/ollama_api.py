"""Ollama's chat and prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, ClassVar

import ollama

from protocols.protocol import Answer, Ask, Call, LogProb, Protocol, given


class Ollama(Protocol):
    """What both of Ollama's ways to ask share."""

    failure = ollama.ResponseError
    method: ClassVar[str]
    """The method of the package's client."""

    def options(self, ask: Ask) -> dict[str, Any]:
        options = given(num_predict=ask.max_tokens) | ({"stop": ask.stop} if ask.stop else {})
        fields = given(format=ask.schema, think=ask.thinks, top_logprobs=ask.log_probs)
        logs = {} if ask.log_probs is None else {"logprobs": True}
        return fields | logs | {"options": options}

    def ask(self, url: str, ask: Ask, *, stream: bool = False) -> Answer:
        with ollama.Client(host=url) as client:
            found = getattr(client, self.method)(**self.body(ask) | {"stream": stream})
            return self._read(found if stream else [found])

    def _read(self, parts: Iterable[Any]) -> Answer:
        answer = Answer()
        for part in parts:
            assert not answer.reason, "a line follows the last one"
            answer.message = message = part.message if self.method == "chat" else part
            answer.add(self.text(message), message.thinking)
            for call in getattr(message, "tool_calls", None) or ():
                answer.calls.append(Call("", call.function.name, call.function.arguments))
            answer.log_probs += [
                LogProb(x.token, x.logprob, {y.token: y.logprob for y in x.top_logprobs})
                for x in part.logprobs or ()
            ]
            assert part.done == (part.done_reason is not None)
            answer.reason = part.done_reason
        answer.prompt_tokens, answer.new_tokens = part.prompt_eval_count, part.eval_count
        assert part.total_duration > part.eval_duration >= 0
        assert part.prompt_eval_duration > 0
        return answer

    def text(self, message: Any) -> str:
        return message.content

    def frames(self, text: str) -> list[dict[str, Any]]:
        return list(map(json.loads, text.splitlines()))


class OllamaChat(Ollama):
    path = "/api/chat"
    method = "chat"
    can = frozenset({
        "messages", "stop", "calls", "schema", "thinking", "images", "log probabilities",
        "continuation", "free length",
    })  # fmt: skip

    def body(self, ask: Ask) -> dict[str, Any]:
        user = {"role": "user", "content": ask.text}
        messages = [user | ({"images": list(ask.images)} if ask.images else {})]
        if ask.system is not None:
            messages.insert(0, {"role": "system", "content": ask.system})
        if ask.answered is not None:
            messages.append(ask.answered.message.model_dump(exclude_none=True))
            messages += [
                {"role": "tool", "tool_name": call.name, "content": result}
                for call, result in zip(ask.answered.calls, ask.results, strict=True)
            ]
        if ask.begun is not None:
            messages.append({"role": "assistant", "content": ask.begun})
        tools = [{"type": "function", "function": f} for f in ask.functions]
        fields = self.options(ask) | ({"tools": tools} if tools else {})
        return {"model": ask.model, "messages": messages, **fields}


class OllamaPrompt(Ollama):
    path = "/api/generate"
    method = "generate"
    can = frozenset({
        "messages", "stop", "schema", "thinking", "images", "log probabilities", "free length",
    })  # fmt: skip

    def body(self, ask: Ask) -> dict[str, Any]:
        images = {"images": list(ask.images)} if ask.images else {}
        fields = given(system=ask.system) | self.options(ask) | images
        return {"model": ask.model, "prompt": ask.text, **fields}

    def text(self, message: Any) -> str:
        return message.response
