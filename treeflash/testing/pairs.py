"""Pairs loaded by the backend under test and by the reference, written once and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Backend, Loader
from treeflash.reference import backend as reference
from treeflash.testing.dialects import write_dialect
from treeflash.testing.models import write_drafter, write_target

LOAD = LoadConfig(dtype="float32")
TARGET_SEED, DRAFTER_SEED = 18, 147  # texts that vary, and drafts that are accepted at times
load_reference = cast(Loader, reference.load)


@dataclass(frozen=True)
class Pair:
    """One pair of folders, loaded twice.

    Attributes:
        target: its folder.
        drafter: its folder.
        tested: as the backend under test loads them.
        reference: as the reference does.
    """

    target: Path
    drafter: Path
    tested: Backend
    reference: Backend

    @classmethod
    def load(cls, loader: Loader, target: Path, drafter: Path) -> Pair:
        """Load two folders with a backend and with the reference."""
        return cls(
            target, drafter, loader(target, drafter, LOAD), load_reference(target, drafter, LOAD)
        )

    @property
    def both(self) -> tuple[Backend, Backend]:
        """The backend under test, then the reference."""
        return self.tested, self.reference


class PairMaker(Protocol):
    """The fixture `pair`."""

    def __call__(
        self,
        family: str | None = None,
        *,
        target: Mapping[str, Any] | None = None,
        drafter: Mapping[str, Any] | None = None,
    ) -> Pair:
        """A pair of a family, the suite's first by default.

        Further options are those of `write_target`, and of `write_drafter` or `write_dialect`.
        """


class Pairs:
    """Makes pairs in a folder, each once."""

    def __init__(self, folder: Path, loader: Loader) -> None:
        """Start with none."""
        self.folder = folder
        self.loader = loader
        self.made: dict[str, Pair] = {}

    def make(
        self, family: str, target: Mapping[str, Any] | None, drafter: Mapping[str, Any] | None
    ) -> Pair:
        """Write and load a pair, unless the same one was asked for before."""
        key = repr((family, target, drafter))
        if key not in self.made:
            folder = self.folder / str(len(self.made))
            write_target(folder / "target", family, seed=TARGET_SEED, **(target or {}))
            write = write_dialect if drafter and "dialect" in drafter else write_drafter
            write(folder / "drafter", folder / "target", seed=DRAFTER_SEED, **(drafter or {}))
            self.made[key] = Pair.load(self.loader, folder / "target", folder / "drafter")
        return self.made[key]
