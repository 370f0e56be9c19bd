"""The errors a user can meet: each says what is wrong and how to mend it, in one line."""

from __future__ import annotations


class TreeflashError(Exception):
    """Base of every error that treeflash raises on purpose."""


class ConfigError(TreeflashError, ValueError):
    """A setting, or a combination of settings, that makes no sense."""


class BackendError(TreeflashError):
    """A backend is unknown, not installed, or has no usable device."""


class CheckpointError(TreeflashError):
    """A checkpoint is missing, damaged, or does not fit the target."""


class UnsupportedModelError(TreeflashError):
    """A target whose layers cannot run a draft tree."""


class PromptError(TreeflashError, ValueError):
    """A prompt that cannot be decoded: empty, too long, or with unknown tokens."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, or a framework's own error, says that memory ran out."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in said or "allocate memory" in said)
    )


class NumericalError(TreeflashError, ArithmeticError):
    """A model produced values that are not finite."""
