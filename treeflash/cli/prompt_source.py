"""Where a single prompt comes from: the argument, a file, standard input, or a sample."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import TextIO

from rich.console import Console

from treeflash.errors import PromptError
from treeflash.text.prompt_file import read_text

SAMPLE_PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."


def read_prompt(given: str | None, file: Path | None, console: Console) -> str:
    """The given prompt, else that of the file, else standard input if piped, else a sample.

    A last newline of the file or of standard input is dropped.

    Raises:
        PromptError: the file or standard input is empty, or not text.
    """
    if given is not None:
        return given
    if file is not None:
        source, text = str(file), read_text(file)
    elif _is_piped(sys.stdin):
        source, text = "standard input", _read(sys.stdin)
    else:
        console.print(f"no prompt given; using a sample: {SAMPLE_PROMPT}\n")
        return SAMPLE_PROMPT
    if not text.strip():
        raise PromptError(f"{source} is empty; give a prompt")
    return text.removesuffix("\n")


def _read(stream: TextIO) -> str:
    try:
        return stream.read().removeprefix("\ufeff")  # a byte order mark
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not text: {error.reason}") from error


def _is_piped(stream: TextIO | None) -> bool:
    """Whether a stream has content to read: it is neither a terminal nor the null device."""
    if stream is None or stream.closed:
        return False
    try:
        return not stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    except OSError:  # not a file but something in memory
        return True
