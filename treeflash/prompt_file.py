"""Files of many prompts: JSON lines, each one conversation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treeflash.errors import ConfigError, PromptError
from treeflash.prompt import Message, check_messages


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation to be had.

    Attributes:
        id: as given; it names the row in the output.
        turns: what the user brings, turn by turn: usually one message each.
    """

    id: str | int
    turns: tuple[tuple[Message, ...], ...]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file. Each is a JSON object with `id` and one of these; other keys are free.

    - `turns`: a list of user texts, answered one after the other;
    - `prompt`: one user text;
    - `messages`: a conversation so far, dicts with `role` and `content`.

    Raises:
        PromptError: names the file and the line that is not such a row, or repeats an id.
    """
    rows: list[Row] = []
    lines: dict[str | int, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _row(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path}:{number}: {error}") from None
        if row.id in lines:
            raise PromptError(
                f"{path}:{number}: the id {row.id!r} was given on line {lines[row.id]} already"
            )
        lines[row.id] = number
        rows.append(row)
    if not rows:
        raise PromptError(f"{path} holds no prompts; one JSON object per line is needed")
    return rows


def read_text(path: Path) -> str:
    """The text of a file that the user named.

    Raises:
        PromptError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text: {error.reason}") from error


def written_lines(output: Path) -> list[bytes]:
    """What an earlier run left in an output file, with line ends; the file is made if need be.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        output.touch()
        return output.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from error


def _row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise PromptError("a JSON object with an id is needed")
    name = value.get("id")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise PromptError("the row needs an 'id', a text or a whole number")
    given = [key for key in ("turns", "prompt", "messages") if key in value]
    if len(given) != 1:
        raise PromptError("the row needs exactly one of 'turns', 'prompt' and 'messages'")
    content = value[given[0]]
    if given[0] == "messages":
        if not isinstance(content, list) or not content:
            raise PromptError("'messages' must be a list, not empty")
        check_messages(content)
        return Row(id=name, turns=(tuple(content),))
    turns = [content] if given[0] == "prompt" else content
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        raise PromptError(f"'{given[0]}' must be text" + (", one a turn" * (given[0] == "turns")))
    return Row(id=name, turns=tuple(({"role": "user", "content": turn},) for turn in turns))
