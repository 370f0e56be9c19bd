"""OpenAI's responses."""

from __future__ import annotations

import json
from typing import Any

from protocols.chat import OpenAI
from protocols.protocol import MODES, Answer, Ask, Call, given


class FailedResponseError(Exception):
    """The stream ended with `response.failed`, for which OpenAI's package has no error."""


class Responses(OpenAI):
    path = "/v1/responses"
    can = frozenset({"messages", "calls", "call ids", "choice", "schema", "thinking", "images",
                     "free length"})  # fmt: skip
    failure = (OpenAI.failure, FailedResponseError)

    def body(self, ask: Ask) -> dict[str, Any]:
        urls = [f"data:image/png;base64,{image}" for image in ask.images]
        parts = [{"type": "input_image", "image_url": url} for url in urls]
        content = [*parts, {"type": "input_text", "text": ask.text}]
        items: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if ask.answered is not None:
            items += [item.model_dump() for item in ask.answered.message]
            items += [
                {"type": "function_call_output", "call_id": call.id, "output": result}
                for call, result in zip(ask.answered.calls, ask.results, strict=True)
            ]
        fields = given(instructions=ask.system, max_output_tokens=ask.max_tokens)
        if ask.functions:
            fields["tools"] = [{"type": "function", **f} for f in ask.functions]
        if ask.choice is not None:
            named = {"type": "function", "name": ask.choice}
            fields["tool_choice"] = ask.choice if ask.choice in MODES else named
        if not ask.parallel:
            fields["parallel_tool_calls"] = False
        if ask.schema is not None:
            fields["text"] = {"format": {"type": "json_schema", "name": "n", "schema": ask.schema}}
        if ask.thinks is not None:
            fields["reasoning"] = {"effort": "high" if ask.thinks else "none"}
        return {"model": ask.model, "input": items, **fields}

    def ask(self, url: str, ask: Ask, *, stream: bool = False) -> Answer:
        with self.client(url) as client:
            if not stream:
                return self._read(client.responses.create(**self.arguments(ask)))
            streamed = Answer()
            for event in client.responses.create(**self.arguments(ask), stream=True):
                if event.type == "response.output_text.delta":
                    streamed.add(event.delta, None)
                elif event.type == "response.reasoning_text.delta":
                    streamed.add(None, event.delta)
                elif event.type == "response.failed":
                    raise FailedResponseError(event.response.error.message)
        answer = self._read(event.response)
        assert (answer.text, answer.thinking) == (streamed.text, streamed.thinking)
        answer.pieces = streamed.pieces
        return answer

    def _read(self, whole: Any) -> Answer:
        answer = Answer(text=whole.output_text, message=whole.output)
        for item in whole.output:
            if item.type == "reasoning":
                answer.thinking += item.content[0].text
            elif item.type == "function_call":
                arguments = json.loads(item.arguments)
                answer.calls.append(Call(item.call_id, item.name, arguments))
        if whole.status == "incomplete":
            assert whole.incomplete_details.reason == "max_output_tokens"
            answer.reason = "length"
        else:
            assert whole.status == "completed"
            answer.reason = "calls" if answer.calls else "stop"
        usage = whole.usage
        answer.prompt_tokens, answer.new_tokens = usage.input_tokens, usage.output_tokens
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
        return answer

    def last_message(self, text: str) -> str:
        error, failed = self.frames(text)[-2:]
        names = [line for line in text.splitlines() if line.startswith("event: ")][-2:]
        assert names == ["event: error", "event: response.failed"]
        assert (error["type"], failed["type"]) == ("error", "response.failed")
        fault = {"code": error["code"], "message": error["message"]}
        assert (failed["response"]["status"], failed["response"]["error"]) == ("failed", fault)
        assert error["code"] in ("server_error", "timeout", "memory", "internal_error")
        return error["message"]
