"""Tell a full or protected disk from a network that fails, when a model cannot be fetched."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
PROTECTED = tuple(os.strerror(number) for number in (errno.EACCES, errno.EPERM, errno.EROFS))
"""The words of the operating system, which also stand in the messages of other programs."""


def disk_problem(failure: Exception | str, folder: Path, variable: str) -> str | None:
    """Say what is wrong with the disk, and what to do; None if the disk is not the reason.

    Args:
        failure: an exception, or what another program printed.
        folder: where the model was to be written.
        variable: the environment variable that sets this folder.
    """
    errors = [] if isinstance(failure, str) else list(_chain(failure))
    text = failure if isinstance(failure, str) else "\n".join(map(str, errors))
    if any(words in text for words in FULL):
        return (
            f"no space is left on the disk of {folder}; free some, or set {variable} to a folder "
            "on another disk"
        )
    if not any(words in text for words in PROTECTED):
        return None
    # This import takes longer than `--help`.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined, unused-ignore]

    # A firewall can also deny permission, but for a connection.
    if any(isinstance(error, HTTPError) for error in errors):
        return None
    return f"{folder} cannot be written; set {variable} to a writable folder"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
