"""Which kernels were the fastest when timed, kept from one process to the next.

Timing takes seconds on a small Mac, and finds the same until something changes: the chip, its
macOS, MLX, or the kernels. A file has the verdicts of one such combination. A kernel that was wrong
or did not compile is tried again by every process, and one that won is checked again.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from treeflash.config import remember

FACTS = ("architecture", "device_name", "memory_size")


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel was faster than MLX's operation.

    Attributes:
        winner: name of the fastest variant of the kernel; None if MLX's operation won.
        text: as `doctor` tells it.
        day: when they were timed, YYYY-MM-DD.
    """

    winner: str | None
    text: str
    day: str

    @classmethod
    def found_now(cls, winner: str | None, text: str) -> Verdict:
        return cls(winner, text, f"{datetime.now(UTC):%Y-%m-%d}")


class KeptVerdicts:
    """The verdicts in a file, by kernel and shape; without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._verdicts = path, _read(path)

    def find(self, name: str) -> Verdict | None:
        """Return a verdict; None if the kernel was never timed."""
        return self._verdicts.get(name)

    def keep(self, name: str, verdict: Verdict) -> None:
        """Keep a verdict; that the folder cannot be written is not an error."""
        if self.path is None:
            return
        self._verdicts[name] = verdict
        stored = {each: asdict(kept) for each, kept in self._verdicts.items()}
        remember(self.path, json.dumps(stored, indent=1))

    def forget(self) -> None:
        """Let all kernels be timed again."""
        self._verdicts.clear()


def file_of(folder: Path, sources: Iterable[Path]) -> Path:
    """Return the file for this machine, its versions, and kernels in these source files."""
    info = mx.device_info()
    # Not the machine's name, which a Mac gets from the network that it is in.
    parts = [platform.mac_ver()[0], *(str(info.get(fact)) for fact in FACTS)]
    parts += [version(name) for name in ("mlx", "mlx-lm")]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return folder / f"{digest.hexdigest()[:16]}.json"


def _read(path: Path | None) -> dict[str, Verdict]:
    """Return the verdicts in a file; none if it is missing or damaged."""
    if path is None:
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): Verdict(**fields) for name, fields in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
