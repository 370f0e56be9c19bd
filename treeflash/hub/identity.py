"""What stored states of a pair depend on besides their tokens, as one hash.

The weights are read whole: two fine-tunes of a model may have the same headers and sizes. The hash
of a file is remembered with its size and times, so that only new files are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from treeflash.config import LoadConfig, remember
from treeflash.decoding.interfaces import Backend

IDENTIFYING_FILES = ("config.json", "adapter_config.json", "*.safetensors")
PACKAGES = ("treeflash", "numpy", "torch", "transformers", "llvmlite", "triton", "mlx", "mlx-lm")


def pair_identity(
    backend: Backend, loaded: LoadConfig, folders: Iterable[Path | None], memory: Path
) -> bytes:
    """Hash a loaded pair, 32 bytes: its weights, how it is run, and by which versions.

    `folders` have the weights; `memory` is the folder of the hashes of files that were read before.
    """
    weights = [
        [(path.name, _file_hash(path, memory)) for path in _files(folder)]
        for folder in folders
        if folder is not None
    ]
    device = backend.name, backend.device, backend.device_name
    # Other layers may run a target that takes images, for which packages must be installed.
    run = *device, backend.dtype, backend.inexact is None, isinstance(backend.images, str)
    settings = asdict(replace(loaded, device=None))  # the pair names its device, however chosen
    described = json.dumps([weights, run, settings, _versions()])
    return hashlib.sha256(described.encode()).digest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for pattern in IDENTIFYING_FILES for path in folder.glob(pattern))


def _file_hash(path: Path, memory: Path) -> str:
    """Return the SHA-256 of a file; that `memory` cannot be written is not an error."""
    status = path.stat()
    known = path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    note = memory / hashlib.sha256(repr(known).encode()).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        if len(text := note.read_text()) == 64:
            return text
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    remember(note, found)
    return found


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
