"""Writing the files of a run: whole or not at all, with one clear error for a full disk."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from treeflash.errors import ConfigError, is_out_of_memory


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of writing a file or folder into one that names it.

    Raises a ConfigError if the disk is full, or the path cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError) as error:  # from safetensors and torch.save
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path} cannot be written; is the disk full? ({reason})") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which then replaces `path`: readers never see half a file.

    Raises a ConfigError if the file cannot be written.
    """
    scratch = path.with_name(path.name + ".tmp")
    with writing(path):
        scratch.touch()
        mode = stat.S_IMODE(scratch.stat().st_mode)
        yield scratch
        scratch.chmod(mode)  # safetensors makes files that only their owner can read
        scratch.replace(path)
