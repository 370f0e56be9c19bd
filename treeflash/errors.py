"""Errors whose messages are for users: one line says what is wrong and what to do about it."""

from __future__ import annotations


class TreeflashError(Exception):
    """Base of every error that treeflash raises on purpose."""


class ConfigError(TreeflashError, ValueError):
    """A setting, or a combination of settings, is invalid."""


class BackendError(TreeflashError):
    """A backend is unknown, not installed, or has no usable device."""


class CPUBuildError(BackendError):
    """The installed framework is built for CPUs alone, so a GPU was not expected."""


class CheckpointError(TreeflashError):
    """A checkpoint is missing, damaged, or does not fit the target."""


class UnsupportedModelError(TreeflashError):
    """A target's layers cannot run a draft tree."""


class PromptError(TreeflashError, ValueError):
    """A prompt cannot be decoded: it is empty, too long, or has unknown tokens."""


class ContextLengthError(PromptError):
    """A prompt has as many tokens as the target has positions, or more."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens and the target's limit is {limit}, new tokens "
            "included; shorten the prompt"
        )
        self.tokens, self.limit = tokens, limit


class MemoryInUseError(TreeflashError, MemoryError):
    """The memory that is set aside for sequences has no room until another sequence ends."""


class MemoryShortError(ConfigError, MemoryError):
    """A device has too little free memory for a model and its texts; other models may have it."""


class NumericalError(TreeflashError, ArithmeticError):
    """A model produced values that are not finite."""


class DeviceError(TreeflashError):
    """A GPU failed in work that it had accepted, so what it wrote since then is unknown."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"the GPU failed in work that was under way; try again ({first_line(error)})"
        )


class DeviceMemoryError(DeviceError, MemoryError):
    """Memory ran out in work that a GPU had accepted."""

    def __init__(self, error: Exception) -> None:
        Exception.__init__(
            self,
            "the GPU ran out of memory in work that was under way; shorten the prompt, decode "
            f"fewer texts at once, or use a smaller model ({first_line(error)})",
        )


OUT_OF_MEMORY = (
    "out of memory",
    "allocate memory",
    # MLX, on Metal and on a CPU
    "insufficient memory",
    "unable to allocate",
    "maximum allowed buffer size",
    "resource limit",
    # cuBLAS and cuDNN, whose workspaces have no room
    "_status_alloc_failed",
)
DEVICE_LOST = (
    # Metal
    "gpu timeout",
    "gpu hang",
    "submissionsignored",
    # CUDA, as PyTorch, NCCL and Triton report it: after an invalid access or a fault of the
    # hardware every call fails, until the process ends
    "cuda error",
    "triton error [cuda]",
    # ranks of torchrun that wait for one that failed
    "restart torchrun",
)
"""Parts of messages after which a device refuses all further work of the process."""
CAPTURE_FAILED = ("captur",)
"""What CUDA's errors about the capture of a graph have in common; the device still works then."""
FAILED_EARLIER = (
    # MLX keeps the error of a command buffer, and the next call that needs the GPU raises it
    "[metal] command buffer",
)
"""Parts of messages about work that a device accepted before the call that raises the error."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, according to an error of Python or of a framework."""
    return isinstance(error, MemoryError) or _says(error, OUT_OF_MEMORY)


def is_device_lost(error: Exception) -> bool:
    """Return whether the device refuses all further work, so that only a new process can go on."""
    is_lost = _says(error, DEVICE_LOST) and not _says(error, CAPTURE_FAILED)
    return is_lost and not is_out_of_memory(error)


def is_of_earlier_work(error: Exception) -> bool:
    """Return whether work failed that a device accepted earlier, by whatever sequences."""
    return _says(error, FAILED_EARLIER) and not is_device_lost(error)


def device_error(error: Exception) -> DeviceError:
    """Return the error for the user of work that failed after a device had accepted it."""
    return (DeviceMemoryError if is_out_of_memory(error) else DeviceError)(error)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; its type if it has no message.

    A line that only says where the error is, as a compiler's does, comes before the last one.
    """
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[-1].strip()}" if others and first.endswith(":") else first


def _says(error: Exception, parts: tuple[str, ...]) -> bool:
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in message for part in parts)
