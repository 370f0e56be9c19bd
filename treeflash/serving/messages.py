"""Messages of a conversation, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.schemas import Schema


class TextPart(Schema):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Schema):
    """What was called; the arguments are a JSON object, as text."""

    name: str
    arguments: str


class MessageToolCall(Schema):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None  # clients that join the parts of a stream leave it there

    def template(self) -> dict[str, Any]:
        """As chat templates read it: with the arguments as an object."""
        arguments = parsed_arguments(self.function.arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(Schema):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    type: Literal["text"] | None = None  # lm-eval sends it
    refusal: None = None

    def template(self) -> dict[str, Any]:
        """As chat templates read it.

        Raises:
            APIError: the fields do not fit the role.
        """
        self._check()
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        found: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content,
        }
        for name in ("reasoning_content", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        if self.tool_calls:
            found["tool_calls"] = [call.template() for call in self.tool_calls]
        return found

    def _check(self) -> None:
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content is not None):
            raise _error(f"tool_calls and reasoning_content are not for the role {self.role}")
        if self.role == "tool" and self.tool_call_id is None:
            raise _error("a message of the role tool needs tool_call_id")
        if self.role != "tool" and self.tool_call_id is not None:
            raise _error(f"tool_call_id is not for the role {self.role}")
        if self.content is None and not self.tool_calls:
            raise _error(f"a message of the role {self.role} needs content")


def templates(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as chat templates read them.

    Raises:
        APIError: see `Message.template`.
    """
    return [message.template() for message in messages]


def parsed_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call.

    Raises:
        APIError: they are not a JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _error("the arguments of a tool call are not a JSON object")
    return found


def _error(message: str) -> APIError:
    return APIError(BAD_REQUEST, message, param="messages")
