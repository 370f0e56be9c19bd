"""Files of text that a user names: whole texts, and one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from treeflash.errors import PromptError

T = TypeVar("T")


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
