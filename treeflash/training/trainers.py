"""Trainers by name: backends that can train register an entry point for it."""

from __future__ import annotations

from typing import cast

from treeflash.errors import BackendError
from treeflash.registry import available, installed, load_entry_point
from treeflash.training.interfaces import Trainer

GROUP = "treeflash.trainers"


def trainer(name: str | None) -> Trainer:
    """The entry point of a backend that can train; None is the first installed.

    Raises:
        BackendError: no backend has that name, it cannot train, or its framework is missing.
    """
    entries = available(GROUP)
    if name is None:
        name = next(filter(installed, sorted(entries)), "cuda")
    if name not in entries and name in available():
        raise BackendError(f"backend {name!r} cannot train; use --backend {', '.join(entries)}")
    return cast(Trainer, load_entry_point(name, entries))
