"""Splits an answer into reasoning, content and tool calls, while it is generated.

The form of a message is declared by a response template, as transformers reads it: see
`PreTrainedTokenizer.get_response_parser`. A `MessageParser` reads one answer with it.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from treeflash.decoding.families import family_of
from treeflash.drafters.folder import read_config
from treeflash.serving.response_templates import TOOL_CALL_PARSERS
from treeflash.text.grammar import SPACE, Grammar, escape_slashes
from treeflash.text.json_schema import SchemaReader
from treeflash.text.stream import Chunk
from treeflash.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers.utils.chat_parsing import ResponseParser

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the reasoning in response templates."""
INVALID_CALL = (ValueError, TypeError, KeyError, RecursionError)
"""Exceptions of transformers' parser for a text that begins like a call but is not one."""


@dataclass(frozen=True, eq=False)
class ResponseTemplate:
    """The form of an assistant's message; `source` is what transformers reads."""

    source: Mapping[str, Any]

    @classmethod
    def find(
        cls, tokenizer: Tokenizer, folder: Path | None, parser: str | None = None
    ) -> ResponseTemplate | None:
        """Find the template of a tool call parser, of the tokenizer, or of the model's family.

        `folder` is the model's; `parser` is a name of `TOOL_CALL_PARSERS`, or None to detect it.
        """
        if parser is not None:
            return cls(TOOL_CALL_PARSERS[parser])
        source = getattr(tokenizer.transformers, "response_template", None)
        if source is None and folder is not None:
            form = family_of(read_config(folder).get("model_type")).tool_calls
            source = None if form is None else TOOL_CALL_PARSERS[form]
        return None if source is None else cls(source)

    @property
    def fields(self) -> Mapping[str, Mapping[str, Any]]:
        """The parts of a message: the beginning, the end and the form of each."""
        fields: Mapping[str, Mapping[str, Any]] = self.source["fields"]
        return fields

    def names(self, token: str) -> bool:
        """Return whether the form refers to a special token, as a text or in a pattern."""
        return token in json.dumps(self.source, ensure_ascii=False).replace("\\", "")

    @property
    def _reasoning(self) -> Mapping[str, Any]:
        """The field of the reasoning; empty if there is none."""
        return next((self.fields[name] for name in REASONING if name in self.fields), {})

    @property
    def reasoning_opening(self) -> str | None:
        """The text that begins the reasoning, if it is always the same."""
        opening = self._reasoning.get("open")
        return opening if isinstance(opening, str) else None

    @property
    def reasoning_close(self) -> str | None:
        """The text that ends the reasoning, if it is always the same."""
        close = self._reasoning.get("close")
        return close if isinstance(close, str) else None

    def reasoning_ends(self, *, begun: bool) -> tuple[str, str] | None:
        """Return the texts before and after the reasoning; None if one is not always the same.

        The first is empty if the prompt has `begun` the reasoning.
        """
        opening, close = "" if begun else self.reasoning_opening, self.reasoning_close
        return None if opening is None or close is None else (opening, close)

    def prepend_reasoning(self, grammar: Grammar, tokenizer: Tokenizer, *, begun: bool) -> Grammar:
        """Return a grammar after reasoning, which is optional if the prompt has not `begun` it.

        Where the reasoning begins or ends with a special token, only this token is accepted there:
        no text of a grammar matches it, and a model does not write its name.
        """
        if (ends := self.reasoning_ends(begun=begun)) is None:
            return grammar
        opening, close = ends
        begin, opening = _part_token(tokenizer, opening, 0)
        end, close = _part_token(tokenizer, close, -1)
        opening, close = (escape_slashes(re.escape(text)) for text in (opening, close))
        lead = f"{begin} thought {end} /{SPACE}/"
        # A special token ends any text; other ends are the first ones in the text.
        rule = f"thought{'' if end else '[lazy]'}: /{opening}(?s:.*){close}/"
        return grammar.prepend(lead if begun else f"({lead})?", rule=rule)


def _part_token(tokenizer: Tokenizer, text: str, place: Literal[0, -1]) -> tuple[str, str]:
    """Return the special token that is first or last in a text, in the Lark format, and the rest.

    The first result is empty without such a token.
    """
    tokens = tokenizer.encode_continuation(text)
    if not tokens or tokens[place] not in tokenizer.special_token_ids:
        return "", text
    name = tokenizer.token_text(tokens[place])
    return f"<[{tokens[place]}]>", text.removesuffix(name) if place else text.removeprefix(name)


@dataclass(frozen=True, eq=False)
class MessageForm:
    """The form of the answers to one prompt."""

    template: ResponseTemplate
    prompt: str
    """The prompt with special tokens, which may contain the beginning of the message."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions in OpenAI's form, with the types of their parameters alone."""
    calls_only: bool = False
    """Whether a grammar makes the message consist of calls; the last one may be cut off."""

    @classmethod
    def of(
        cls,
        template: ResponseTemplate,
        prompt: str,
        tools: Sequence[Mapping[str, Any]],
        *,
        calls_only: bool = False,
    ) -> MessageForm:
        """Make a form with functions of any schemas, which may take seconds to read."""
        return cls(template, prompt, list(map(_with_types, tools)), calls_only)

    def parser(self) -> ResponseParser | None:
        """Return a parser that has read the prompt; None if the prompt has an invalid call."""
        from transformers.utils.chat_parsing import ResponseParser

        source, tools = self.template.source, list(self.tools)
        try:
            return ResponseParser(source, prefix=self.prompt, tools=tools)
        except INVALID_CALL:  # in the message that the answer continues, for example
            return None

    @cached_property
    def in_reasoning(self) -> bool:
        """Whether the prompt ends within the reasoning."""
        if (parser := self.parser()) is None:
            return False
        events = [x for x in parser.initial_events if x["field"] in REASONING]
        return bool(events) and events[-1]["type"] != "region_close"


def _with_types(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a function with the types of its parameters alone: transformers follows no reference.

    It reads texts by these types.
    """
    function = tool["function"]
    schema = function.get("parameters") or {}
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    reader = SchemaReader(schema)
    types = {
        key: {"type": reader.types(value)}
        for key, value in (properties if isinstance(properties, Mapping) else {}).items()
    }
    parameters = {"type": "object", "properties": types}
    return {"type": "function", "function": {"name": function["name"], "parameters": parameters}}


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that a model has written; the arguments are a JSON object, as text."""

    id: str
    name: str
    arguments: str

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> ToolCall:
        """Read a call of transformers' parser; raises an `INVALID_CALL` if it is invalid."""
        function = value.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError("the call has no name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, Mapping):
            raise ValueError("the arguments are not an object")
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (function["name"] + text).encode()  # no response can have lone surrogates
        # Chat templates of Mistral accept ids of nine characters only.
        return cls(id=secrets.token_hex(5)[1:], name=function["name"], arguments=text)


PartKind = Literal["content", "reasoning", "call"]


@dataclass
class MessagePart:
    """A part of a message: the content or the reasoning so far, or a complete call."""

    index: int
    kind: PartKind
    text: str = ""
    call: ToolCall | None = None
    cut_off: bool = False
    """Whether the maximum length ended the part."""


@dataclass(frozen=True)
class PartChange:
    """A change of a part of a message: the part after it, and the added text."""

    event: Literal["open", "text", "close"]
    """`open` and `close` come once; `text` may come often, and never for a call."""
    part: MessagePart
    text: str = ""


def text_of(changes: Sequence[PartChange], kind: PartKind) -> str:
    """Return the text that changes add to parts of a kind."""
    return "".join(change.text for change in changes if change.part.kind == kind)


def calls_of(changes: Sequence[PartChange]) -> list[ToolCall]:
    """Return the calls that changes add."""
    return [x.part.call for x in changes if x.event == "open" and x.part.call is not None]


Delta = tuple[Literal["content", "reasoning"], str] | ToolCall
"""Text to append to a part, or a complete call."""


class MessageParser:
    """Splits one answer into the parts of a message; without a form, all of it is content.

    A finished message has at least an empty content.
    """

    def __init__(self, form: MessageForm | None, tokenizer: Tokenizer) -> None:
        self.parts: list[MessagePart] = []
        self._open: MessagePart | None = None
        self._form = form
        self._calls_only = form is not None and form.calls_only
        self._parser: ResponseParser | None = None if form is None else form.parser()
        self._tokenizer = tokenizer
        self._text = ""
        self._unfinished_call = ""

    @property
    def content(self) -> str:
        return "".join(part.text for part in self.parts if part.kind == "content")

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.parts if part.kind == "reasoning")

    @property
    def calls(self) -> list[ToolCall]:
        return [part.call for part in self.parts if part.call is not None]

    def count_reasoning(self, token_ids: Sequence[int]) -> int:
        """Count the tokens of the answer up to the end of its reasoning; 0 if that is not known."""
        close = None if self._form is None else self._form.template.reasoning_close
        if close is None or not self.reasoning:
            return 0

        def has_ended(count: int) -> bool:
            return close in self._tokenizer.decode_verbatim(token_ids[:count])

        return bisect_left(range(len(token_ids)), True, key=has_ended)

    def read(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            for _ in self.feed(chunk):
                pass

    def feed(self, chunk: Chunk) -> Iterator[PartChange]:
        """Read the next chunk; yields the changes that it makes, one by one."""
        for delta in self._read(chunk):
            if isinstance(delta, ToolCall):
                yield from self._begin("call", delta)
                yield from self._end()
                continue
            kind, text = delta
            if not text or (kind == "content" and self._calls_only):
                continue
            if self._open is None or self._open.kind != kind:
                yield from self._begin(kind)
            assert self._open is not None
            self._open.text += text
            yield PartChange("text", self._open, text)
        if chunk.finish_reason is not None:
            if not self.parts:
                yield from self._begin("content")
            if self._open is not None:
                self._open.cut_off = chunk.finish_reason == "length"
            yield from self._end()

    def _begin(self, kind: PartKind, call: ToolCall | None = None) -> Iterator[PartChange]:
        yield from self._end()
        self._open = MessagePart(len(self.parts), kind, call=call)
        self.parts.append(self._open)
        yield PartChange("open", self._open)

    def _end(self) -> Iterator[PartChange]:
        if self._open is not None:
            yield PartChange("close", self._open)
            self._open = None

    def _read(self, chunk: Chunk) -> list[Delta]:
        deltas, start = list[Delta](), 0
        for position, token_id in chunk.special_tokens:
            deltas += self._read_text(chunk.text[start:position])
            deltas += self._read_special(self._tokenizer.token_text(token_id))
            start = position
        deltas += self._read_text(chunk.text[start:])
        if chunk.finish_reason is not None and self._parser is not None:
            # An end token is not needed, because the end of the text closes every part.
            try:
                _, events = self._parser.finalize()
                deltas += self._deltas(events)
            except INVALID_CALL:  # it is unfinished
                deltas += self._give_up("")
        return deltas

    def _read_text(self, text: str) -> list[Delta]:
        if self._parser is None:  # there is no template, or a call was invalid
            return [("content", text)]
        try:
            return self._parse(text)
        except INVALID_CALL:
            return self._parse_again(text)

    def _read_special(self, name: str) -> list[Delta]:
        """Read a special token, which is no text, but may begin or end a part of the message."""
        if self._parser is None or self._form is None or not self._form.template.names(name):
            return []
        try:
            return self._parse(name)
        except INVALID_CALL:
            return self._give_up("")

    def _parse(self, text: str) -> list[Delta]:
        assert self._parser is not None
        deltas = self._deltas(self._parser.feed(text))
        self._text += text
        return deltas

    def _parse_again(self, text: str) -> list[Delta]:
        """Read the text character by character, up to the invalid call."""
        assert self._form is not None
        self._parser = self._form.parser()
        assert self._parser is not None
        self._unfinished_call = ""
        self._deltas(self._parser.feed(self._text))
        deltas, rest = [], iter(text)
        with suppress(*INVALID_CALL):
            for character in rest:
                deltas += self._deltas(self._parser.feed(character))
        return deltas + self._give_up("".join(rest))

    def _give_up(self, rest: str) -> list[Delta]:
        """Make an invalid call content, and everything after it."""
        self._parser = None
        return [("content", self._unfinished_call + rest)]

    def _deltas(self, events: Sequence[Mapping[str, Any]]) -> list[Delta]:
        deltas: list[Delta] = []
        for event in events:
            field, kind = event["field"], event["type"]
            if kind == "region_chunk" and event["dirty"]:
                self._unfinished_call += event["text"]
            elif kind == "region_chunk" and field in REASONING:
                deltas.append(("reasoning", event["text"]))
            elif kind == "region_chunk" and field == "content":
                deltas.append(("content", event["text"]))
            elif kind == "region_close" and field == "tool_calls":
                values = event["value"] if isinstance(event["value"], list) else [event["value"]]
                deltas += map(ToolCall.parse, values)
                self._unfinished_call = ""
        return deltas
