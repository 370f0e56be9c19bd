"""Anthropic's messages."""

from __future__ import annotations

from typing import Any

import anthropic

from protocols.protocol import MODES, Answer, Ask, Call, Protocol

REASONS = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "calls"}
CHOICES = {"required": "any", None: "auto"}


class Messages(Protocol):
    path = "/v1/messages"
    can = frozenset({
        "messages", "stop", "named stop", "calls", "call ids", "choice", "schema", "thinking",
        "images", "continuation",
    })  # fmt: skip
    failure = anthropic.APIError

    def body(self, ask: Ask) -> dict[str, Any]:
        sources = [{"type": "base64", "media_type": "image/png", "data": x} for x in ask.images]
        content = [{"type": "image", "source": source} for source in sources]
        content.append({"type": "text", "text": ask.text})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if ask.answered is not None:
            # with null for the fields that this server does not have
            blocks = [block.model_dump() for block in ask.answered.message]
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": result}
                for call, result in zip(ask.answered.calls, ask.results, strict=True)
            ]
            messages.append({"role": "assistant", "content": blocks})
            messages.append({"role": "user", "content": results})
        fields: dict[str, Any] = {}
        if ask.system is not None:
            fields["system"] = ask.system
        if ask.begun is not None:
            messages.append({"role": "assistant", "content": ask.begun})
        if ask.stop:
            fields["stop_sequences"] = ask.stop
        if ask.functions:
            fields["tools"] = [
                {"input_schema" if name == "parameters" else name: x for name, x in f.items()}
                for f in ask.functions
            ]
        if ask.choice is not None or not ask.parallel:
            mode = {"type": CHOICES.get(ask.choice, ask.choice)}
            choice = mode if ask.choice in MODES else {"type": "tool", "name": ask.choice}
            alone = {} if ask.parallel else {"disable_parallel_tool_use": True}
            fields["tool_choice"] = choice | alone
        if ask.schema is not None:
            form = {"type": "json_schema", "schema": ask.schema}
            fields["output_config"] = {"format": form}
        if ask.thinks is not None:
            fields["thinking"] = {"type": "enabled" if ask.thinks else "disabled"}
        return {
            "model": ask.model,
            "messages": messages,
            "max_tokens": ask.max_tokens or 2048,
            **fields,
        }

    def ask(self, url: str, ask: Ask, *, stream: bool = False) -> Answer:
        with anthropic.Anthropic(base_url=url, api_key="-", max_retries=0) as client:
            if not stream:
                return self._read(client.messages.create(**self.body(ask)))
            streamed = Answer()
            kinds = []
            with client.messages.stream(**self.body(ask)) as events:
                for event in events:
                    kinds.append(event.type)
                    if event.type == "text":
                        streamed.add(event.text, None)
                    elif event.type == "thinking":
                        streamed.add(None, event.thinking)
                answer = self._read(events.get_final_message())
        assert (answer.text, answer.thinking) == (streamed.text, streamed.thinking)
        assert kinds.count("signature") == bool(answer.thinking)
        whole = [kind for kind in kinds if kind.startswith("message")]
        assert whole == ["message_start", "message_delta", "message_stop"]
        answer.pieces = streamed.pieces
        return answer

    def _read(self, whole: Any) -> Answer:
        answer = Answer(message=whole.content, stop_string=whole.stop_sequence)
        for block in whole.content:
            if block.type == "text":
                answer.text += block.text
            elif block.type == "thinking":
                assert block.signature == ""
                answer.thinking += block.thinking
            else:
                answer.calls.append(Call(block.id, block.name, block.input))
        answer.reason = REASONS[whole.stop_reason]
        assert (whole.stop_reason == "stop_sequence") == (whole.stop_sequence is not None)
        usage = whole.usage
        answer.prompt_tokens = usage.input_tokens + usage.cache_read_input_tokens
        answer.new_tokens = usage.output_tokens
        return answer
