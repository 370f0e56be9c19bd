"""Prompts: strings, messages, token ids and files of them, encoded into token ids."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from treeflash.errors import ConfigError, PromptError
from treeflash.hub.models import DEEPSPEC_SYSTEM
from treeflash.text.tokenizer import Tokenizer, check_unicode

Message: TypeAlias = Mapping[str, str]
"""One turn of a conversation: `role` and `content`."""
Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]
FORMS = "a prompt is a string, a list of messages, or a list of token ids"


def encode(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    system: str | None = None,
    raw: bool = False,
    template_args: Mapping[str, Any] | None = None,
) -> list[int]:
    """Encode a prompt into token ids, which are plain ints.

    A string, unless `raw`, and messages go through the chat template, after the message `system`;
    token ids are used unchanged. Raises a PromptError if the prompt is empty, malformed, or
    rejected by the template, and a ConfigError if an argument does not fit this kind of prompt.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt is empty; give some text")
        check_unicode(prompt)
        if not raw:
            prompt = [{"role": "user", "content": prompt}]
        else:
            return tokenizer.encode(prompt)
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes):
        raise PromptError(f"{FORMS}, got {type(prompt).__name__}")
    items: list[Any] = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        if raw:
            raise ConfigError("messages need the chat template; remove raw, or give a string")
        items = [_join_parts(item) for item in items]
        check_messages(items)
        if system is not None:
            check_unicode(system)
            if items[0]["role"] == "system":
                raise PromptError("the messages begin with a system message; remove system")
            items.insert(0, {"role": "system", "content": system})
        return tokenizer.chat(items, template_args)
    if system is not None or template_args:
        raise ConfigError(
            "token ids do not use the chat template; remove the system message and the template "
            "arguments"
        )
    try:
        return [operator.index(item) for item in items]
    except TypeError:
        raise PromptError(FORMS) from None


def _join_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Join a message's content into one text if it is a list of parts."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise PromptError("a part of a message's content is not a text; only texts are supported")
    return {**message, "content": "".join(map(str, texts))}


def check_messages(messages: Sequence[Any]) -> None:
    """Raise a PromptError unless every message is a mapping with strings `role` and `content`."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise PromptError(f"message {number} needs the strings 'role' and 'content'")
        check_unicode(message["content"])


T = TypeVar("T")
Key: TypeAlias = tuple[str | int, int]
"""The id of a row and the index of a turn."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation to answer, turn by turn; each has new messages, usually one of the user."""

    id: str | int
    turns: tuple[tuple[Message, ...], ...]

    @property
    def keys(self) -> list[Key]:
        return [(self.id, turn) for turn in range(len(self.turns))]


def read_rows(path: Path) -> list[Row]:
    """Read a file of prompts, one JSON object per line.

    An object has one of these keys, and may have an `id`, by default the line's number; other keys
    are ignored:

    - `turns`: a list of user messages as strings, answered one after the other;
    - `prompt`: one user message as a string;
    - `messages`: the conversation so far, dicts with `role` and `content`.

    Raises:
        PromptError: a line is not such an object, or repeats an id; the message names the line.
    """
    lines: dict[str | int, int] = {}
    rows = read_json_lines(path, "prompts", _row)
    for number, row in rows:
        if row.id in lines:
            raise PromptError(
                f"{path}:{number}: the id {row.id!r} is already used on line {lines[row.id]}"
            )
        lines[row.id] = number
    return [row for _, row in rows]


def read_json_lines(path: Path, what: str, parse: Callable[[Any, int], T]) -> list[tuple[int, T]]:
    """Parse each line of a file as JSON; `parse` gets a value and the line's number.

    It may reject a value with a ValueError. Returns pairs of a line number and a result. Raises a
    PromptError if the file cannot be read or is empty, or a line is not JSON or is rejected.
    """
    parsed = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path}:{number}: the line is not JSON: {error}") from None
        try:
            parsed.append((number, parse(value, number)))
        except ValueError as error:
            raise PromptError(f"{path}:{number}: {error}") from None
    if not parsed:
        raise PromptError(f"{path} has no {what}; it must have one JSON object per line")
    return parsed


def read_text(path: Path) -> str:
    """Read a UTF-8 file without a byte order mark; a PromptError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text: {error.reason}") from error


def _row(value: Any, number: int) -> Row:
    if not isinstance(value, dict):
        raise PromptError("each line must be a JSON object")
    name = value.get("id", number)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise PromptError("the row's 'id' must be a string or an integer")
    check_unicode(str(name))
    forms = [key for key in ("turns", "prompt", "messages") if key in value]
    if len(forms) != 1:
        raise PromptError("the row needs exactly one of 'turns', 'prompt' and 'messages'")
    form, content = forms[0], value[forms[0]]
    if form == "messages":
        if not isinstance(content, list) or not content:
            raise PromptError("'messages' must be a non-empty list")
        check_messages(content)
        return Row(id=name, turns=(tuple(content),))
    turns = [content] if form == "prompt" else content
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        kind = "a string" if form == "prompt" else "a non-empty list of strings"
        raise PromptError(f"'{form}' must be {kind}")
    for turn in turns:
        check_unicode(turn)
    return Row(id=name, turns=tuple(({"role": "user", "content": turn},) for turn in turns))


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """A way to turn messages into a prompt."""

    raw: bool = False
    thinking: bool = False  # whether thinking is on, if the chat template has a switch for it
    system: str | None = None

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation up to the response; raises what `encode` of this module does."""
        if self.raw:
            return encode(tokenizer, "\n\n".join(m["content"] for m in messages), raw=True)
        template_args = {"enable_thinking": self.thinking}
        return encode(tokenizer, messages, system=self.system, template_args=template_args)

    def alternatives(self, tokenizer: Tokenizer) -> list[Prompting]:
        """Return other ways to prompt that the tokenizer supports."""
        ways = [Prompting(raw=True)]
        if tokenizer.has_chat_template:
            ways += [Prompting(), Prompting(thinking=self.thinking, system=DEEPSPEC_SYSTEM)]
        if tokenizer.knows_thinking:
            ways.append(Prompting(thinking=True))
        return [way for way in ways if way != self]

    def __str__(self) -> str:
        if self.raw:
            return "without the chat template"
        thinking = f"thinking {'on' if self.thinking else 'off'}"
        system = "" if self.system is None else f", the system message {self.system!r}"
        return f"with the chat template, {thinking}{system}"
