"""Prompt files: JSON lines, one conversation each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from treeflash.errors import PromptError
from treeflash.text.prompt import Message, check_messages
from treeflash.text.tokenizer import check_unicode

T = TypeVar("T")

Key: TypeAlias = tuple[str | int, int]
"""A row's id and the number of the turn, from 0."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation to answer.

    Attributes:
        id: as in the file; it identifies the row in the output.
        turns: the new messages of each turn, usually one from the user.
    """

    id: str | int
    turns: tuple[tuple[Message, ...], ...]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file: JSON objects with `id` and one of these; other keys are ignored.

    - `turns`: a list of user messages as strings, answered one after the other;
    - `prompt`: one user message as a string;
    - `messages`: the conversation so far, dicts with `role` and `content`.

    Raises:
        PromptError: a line is not such a row, or repeats an id; it names the file and the line.
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


def read_json_lines(path: Path, what: str, parse: Callable[[Any], T]) -> list[tuple[int, T]]:
    """Parse each line of a file as JSON; returns the results with their line numbers.

    Raises:
        PromptError: the file cannot be read, is empty, or has a line that is not JSON or that
            `parse` rejects with a ValueError.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append((number, parse(json.loads(line))))
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path}:{number}: {error}") from None
    if not found:
        raise PromptError(f"{path} has no {what}; it must have one JSON object per line")
    return found


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        PromptError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text: {error.reason}") from error


def _row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise PromptError("each line must be a JSON object with an id")
    name = value.get("id")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise PromptError("the row needs an 'id', a string or an integer")
    check_unicode(str(name))
    given = [key for key in ("turns", "prompt", "messages") if key in value]
    if len(given) != 1:
        raise PromptError("the row needs exactly one of 'turns', 'prompt' and 'messages'")
    content = value[given[0]]
    if given[0] == "messages":
        if not isinstance(content, list) or not content:
            raise PromptError("'messages' must be a non-empty list")
        check_messages(content)
        return Row(id=name, turns=(tuple(content),))
    turns = [content] if given[0] == "prompt" else content
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        kind = "a string" if given[0] == "prompt" else "a non-empty list of strings"
        raise PromptError(f"'{given[0]}' must be {kind}")
    for turn in turns:
        check_unicode(turn)
    return Row(id=name, turns=tuple(({"role": "user", "content": turn},) for turn in turns))
