"""OpenAI's chat completions."""

from __future__ import annotations

import json
from typing import Any

import openai
from servers import NAME

from protocols.protocol import MODES, Answer, Ask, Call, LogProb, Protocol, given

PACKAGE_LACKS = ("continue_final_message", "add_generation_prompt", "response_format")
"""Fields of requests that are no arguments of the package's methods, or have another form there."""


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

    def message(self, error: dict[str, Any]) -> str:
        assert set(error) == {"error"}
        assert set(error["error"]) == {"message", "type", "param", "code"}
        return error["error"]["message"]


def count(answer: Answer, usage: Any) -> None:
    """Copy the numbers of tokens, which have these names in two of the APIs."""
    answer.prompt_tokens, answer.new_tokens = usage.prompt_tokens, usage.completion_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


class Chat(OpenAI):
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
        return {"model": NAME, "messages": messages, **fields}

    def ask(self, url: str, ask: Ask, *, stream: bool = False) -> Answer:
        answer = Answer()
        with self.client(url) as client:
            create = client.chat.completions.create
            if stream:
                counted = {"stream": True, "stream_options": {"include_usage": True}}
                for chunk in create(**self.arguments(ask), **counted):
                    for choice in chunk.choices:
                        self._add(answer, choice, choice.delta)
                    if chunk.usage is not None:
                        count(answer, chunk.usage)
            else:
                whole = create(**self.arguments(ask))
                (choice,) = whole.choices
                answer.message = choice.message
                self._add(answer, choice, choice.message)
                count(answer, whole.usage)
        return answer

    def _add(self, answer: Answer, choice: Any, message: Any) -> None:
        assert answer.reason is None, "a chunk follows the last one"
        answer.add(message.content, getattr(message, "reasoning_content", None))
        answer.reason = {"tool_calls": "calls"}.get(choice.finish_reason, choice.finish_reason)
        for call in message.tool_calls or ():
            assert getattr(call, "index", len(answer.calls)) == len(answer.calls)
            arguments = json.loads(call.function.arguments)
            answer.calls.append(Call(call.id, call.function.name, arguments))
        if choice.logprobs is not None:
            answer.log_probs += [
                LogProb(x.token, x.logprob, {y.token: y.logprob for y in x.top_logprobs})
                for x in choice.logprobs.content
            ]
