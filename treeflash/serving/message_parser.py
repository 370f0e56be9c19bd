"""Splits an answer into reasoning, content and tool calls, while it is generated."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers.utils.chat_parsing import ResponseParser

from treeflash.serving.response_templates import REASONING, ResponseTemplate
from treeflash.text.assembler import Chunk
from treeflash.text.detokenizer import TextStream
from treeflash.text.tokenizer import Tokenizer

BROKEN = (ValueError, TypeError, KeyError)
"""What the parser raises for the text of a call that is not one."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that a model has written.

    Attributes:
        id: names the call.
        name: of the function.
        arguments: a JSON object, as text.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Delta:
    """What a chunk adds to a message.

    Attributes:
        kind: of the part.
        text: to append to the content or the reasoning.
        call: complete.
    """

    kind: Literal["content", "reasoning", "call"]
    text: str = ""
    call: ToolCall | None = None


@dataclass(frozen=True, eq=False)
class MessageForm:
    """How to read the answers to one prompt.

    Attributes:
        template: of the model's messages.
        prompt: its text, with special tokens: it may contain the beginning of the message.
        tools: functions in OpenAI's form, whose schemas give the arguments their types.
    """

    template: ResponseTemplate
    prompt: str
    tools: Sequence[Mapping[str, Any]] = ()

    def parser(self) -> ResponseParser:
        """A parser that has read the prompt."""
        return ResponseParser(self.template.source, prefix=self.prompt, tools=list(self.tools))

    @property
    def reasoning(self) -> bool:
        """Whether the prompt has begun the reasoning."""
        events = [x for x in self.parser().initial_events if x["field"] in REASONING]
        return bool(events) and events[-1]["type"] != "region_close"


class MessageParser:
    """Reads one answer.

    Attributes:
        content: so far.
        reasoning: so far.
        calls: so far.
    """

    def __init__(
        self, form: MessageForm | None, tokenizer: Tokenizer, stop: Sequence[str] = ()
    ) -> None:
        """Start before the first chunk.

        Args:
            form: how to read the answer; None if all of it is content.
            tokenizer: of the target.
            stop: strings at which the answer ends.
        """
        self._form = form
        self._parser: ResponseParser | None = None if form is None else form.parser()
        # Templates refer to special tokens, which a chunk's text does not have.
        self._stream = TextStream(tokenizer.verbatim, stop)
        self._end_ids = tokenizer.stop_token_ids
        self._read = ""
        self._body = ""  # of an unfinished call
        self.content = ""
        self.reasoning = ""
        self.calls: list[ToolCall] = []

    def feed(self, chunk: Chunk) -> list[Delta]:
        """What the next chunk adds."""
        finished = chunk.finish_reason is not None
        if self._parser is None:
            # Also after a call that could not be read.
            return self._keep([Delta("content", chunk.text)] if chunk.text else [])
        # An end token says nothing: the end of the text closes every part.
        ids = chunk.token_ids
        if ids and ids[-1] in self._end_ids:
            ids = ids[:-1]
        text = self._stream.push(ids)
        if finished:
            text += self._stream.finish()
        deltas = self._parse(text)
        if finished and self._parser is not None:
            try:
                _, events = self._parser.finalize()
                deltas += self._deltas(events)
            except BROKEN:  # an unfinished call
                deltas += self._give_up("")
        return self._keep(deltas)

    def _parse(self, text: str) -> list[Delta]:
        assert self._parser is not None
        try:
            deltas = self._deltas(self._parser.feed(text))
        except BROKEN:
            return self._parse_again(text)
        self._read += text
        return deltas

    def _parse_again(self, text: str) -> list[Delta]:
        """Read this text character by character, up to the broken call."""
        assert self._form is not None
        self._parser = self._form.parser()
        self._body = ""
        self._deltas(self._parser.feed(self._read))
        deltas = []
        for i, character in enumerate(text):
            try:
                deltas += self._deltas(self._parser.feed(character))
            except BROKEN:
                return deltas + self._give_up(text[i + 1 :])
        self._read += text
        return deltas

    def _give_up(self, rest: str) -> list[Delta]:
        """The text of a call that is not one becomes content, as does everything after it."""
        self._parser = None
        text, self._body = self._body + rest, ""
        return [Delta("content", text)] if text else []

    def _deltas(self, events: Sequence[Mapping[str, Any]]) -> list[Delta]:
        deltas = []
        for event in events:
            field, kind = event["field"], event["type"]
            if kind == "region_chunk" and event["dirty"]:
                self._body += event["text"]
            elif kind == "region_chunk" and field in REASONING:
                deltas.append(Delta("reasoning", event["text"]))
            elif kind == "region_chunk" and field == "content":
                deltas.append(Delta("content", event["text"]))
            elif kind == "region_close" and field == "tool_calls":
                values = event["value"] if isinstance(event["value"], list) else [event["value"]]
                deltas += [Delta("call", call=_call(value)) for value in values]
                self._body = ""
        return deltas

    def _keep(self, deltas: list[Delta]) -> list[Delta]:
        for delta in deltas:
            if delta.call is not None:
                self.calls.append(delta.call)
            elif delta.kind == "reasoning":
                self.reasoning += delta.text
            else:
                self.content += delta.text
        return deltas


def call_id() -> str:
    """A name for a call."""
    return f"call_{secrets.token_hex(12)}"


def _call(value: Mapping[str, Any]) -> ToolCall:
    """Raises a ValueError if a call has no name, or its arguments are not an object."""
    function = value.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError("a call without a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError("arguments that are not an object")
    text = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(id=call_id(), name=function["name"], arguments=text)
