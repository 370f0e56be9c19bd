"""OpenAI's chat completions."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import openai

from protocols.protocol import MODES, Answer, Ask, Call, LogProb, Protocol, given

PACKAGE_LACKS = ("continue_final_message", "add_generation_prompt", "response_format")
"""Fields of requests that are no arguments of the package's methods, or have another form there."""
REASONS = {"tool_calls": "calls"}
"""The reasons of ends that have another name in `Answer`."""


class OpenAI(Protocol):
    """What OpenAI's APIs share."""

    failure = openai.APIError

    def client(self, url: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)

    def arguments(self, ask: Ask) -> dict[str, Any]:
        """Return the body as the arguments of the package's method."""
        body = self.body(ask)
        extra = {name: body.pop(name) for name in PACKAGE_LACKS if name in body}
        return {**body, "extra_body": extra}


class Choices(OpenAI):
    """What OpenAI's two APIs with lists of choices share."""

    @abstractmethod
    def method(self, client: openai.OpenAI) -> Callable[..., Any]:
        """Return the package's method."""

    @abstractmethod
    def add(self, answer: Answer, choice: Any) -> None:
        """Add a choice of a chunk, or of a whole answer."""

    def ask(self, url: str, ask: Ask, *, stream: bool = False) -> Answer:
        answer, arguments = Answer(), self.arguments(ask)
        with self.client(url) as client:
            if stream:
                counted = {"stream": True, "stream_options": {"include_usage": True}}
                chunks = self.method(client)(**arguments, **counted)
            else:
                chunks = [self.method(client)(**arguments)]
            for chunk in chunks:
                for choice in chunk.choices:
                    assert answer.reason is None, "a chunk follows the last one"
                    self.add(answer, choice)
                    answer.reason = REASONS.get(choice.finish_reason, choice.finish_reason)
                if (usage := chunk.usage) is not None:
                    answer.prompt_tokens = usage.prompt_tokens
                    answer.new_tokens = usage.completion_tokens
                    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        return answer


class Chat(Choices):
    path = "/v1/chat/completions"
    can = frozenset({
        "messages", "stop", "calls", "call ids", "choice", "schema", "thinking", "images",
        "log probabilities", "continuation", "free length",
    })  # fmt: skip

    def body(self, ask: Ask) -> dict[str, Any]:
        images = [f"data:image/png;base64,{image}" for image in ask.images]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        content = [*parts, {"type": "text", "text": ask.text}] if parts else ask.text
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if ask.system is not None:
            messages.insert(0, {"role": "system", "content": ask.system})
        if ask.answered is not None:
            messages.append(ask.answered.message.model_dump())
            messages += [
                {"role": "tool", "tool_call_id": call.id, "content": result}
                for call, result in zip(ask.answered.calls, ask.results, strict=True)
            ]
        fields = given(max_tokens=ask.max_tokens)
        if ask.begun is not None:
            messages.append({"role": "assistant", "content": ask.begun})
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        if ask.stop:
            fields["stop"] = ask.stop
        if ask.functions:
            fields["tools"] = [{"type": "function", "function": f} for f in ask.functions]
        if ask.choice is not None:
            named = {"type": "function", "function": {"name": ask.choice}}
            fields["tool_choice"] = ask.choice if ask.choice in MODES else named
        if not ask.parallel:
            fields["parallel_tool_calls"] = False
        if ask.schema is not None:
            form = {"type": "json_schema", "json_schema": {"name": "n", "schema": ask.schema}}
            fields["response_format"] = form
        if ask.thinks is not None:
            fields["reasoning_effort"] = "high" if ask.thinks else "none"
        if ask.log_probs is not None:
            fields |= {"logprobs": True, "top_logprobs": ask.log_probs}
        return {"model": ask.model, "messages": messages, **fields}

    def method(self, client: openai.OpenAI) -> Callable[..., Any]:
        return client.chat.completions.create

    def add(self, answer: Answer, choice: Any) -> None:
        message = getattr(choice, "delta", None) or choice.message
        answer.message = message
        answer.add(message.content, getattr(message, "reasoning_content", None))
        for call in message.tool_calls or ():
            assert getattr(call, "index", len(answer.calls)) == len(answer.calls)
            arguments = json.loads(call.function.arguments)
            answer.calls.append(Call(call.id, call.function.name, arguments))
        if choice.logprobs is not None:
            answer.log_probs += [
                LogProb(x.token, x.logprob, {y.token: y.logprob for y in x.top_logprobs})
                for x in choice.logprobs.content
            ]
