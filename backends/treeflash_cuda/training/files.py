"""Files of a run: written whole or not at all, and a full disk is one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from treeflash.errors import ConfigError, is_out_of_memory


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file or folder that could not be written.

    Raises:
        ConfigError: the disk is full, or the path cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    # What safetensors and torch.save raise for a failed write.
    except (SafetensorError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path} cannot be written; is the disk full? ({reason})") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, which then replaces `path`: readers never see half a file.

    Raises:
        ConfigError: the file cannot be written.
    """
    scratch = path.with_name(path.name + ".tmp")
    with writing(path):
        yield scratch
        scratch.replace(path)
