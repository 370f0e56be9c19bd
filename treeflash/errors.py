"""Errors whose messages are for users: one line says what is wrong and what to do about it."""

from __future__ import annotations


class TreeflashError(Exception):
    """Base of every error that treeflash raises on purpose."""


class ConfigError(TreeflashError, ValueError):
    """A setting, or a combination of settings, is invalid."""


class BackendError(TreeflashError):
    """A backend is unknown, not installed, or has no usable device."""


class CheckpointError(TreeflashError):
    """A checkpoint is missing, damaged, or does not fit the target."""


class UnsupportedModelError(TreeflashError):
    """A target's layers cannot run a draft tree."""


class PromptError(TreeflashError, ValueError):
    """A prompt cannot be decoded: it is empty, too long, or has unknown tokens."""


class NumericalError(TreeflashError, ArithmeticError):
    """A model produced values that are not finite."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, according to an error of Python or of a framework."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in message or "allocate memory" in message)
    )
