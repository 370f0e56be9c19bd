"""Trainers by name, which backends that can train register as entry points."""

from __future__ import annotations

from typing import cast

from treeflash.errors import BackendError
from treeflash.registry import available, installed, load_entry_point
from treeflash.training.interfaces import Trainer

GROUP = "treeflash.trainers"


def trainer(name: str | None) -> Trainer:
    """The trainer of a backend; None is the first that is installed.

    Raises:
        BackendError: the backend is unknown, cannot train, or its framework is not installed.
    """
    entries = available(GROUP)
    if name is None:
        name = next(filter(installed, sorted(entries)), "cuda")
    if name not in entries and name in available():
        raise BackendError(f"backend {name!r} cannot train; use --backend {', '.join(entries)}")
    return cast(Trainer, load_entry_point(name, entries))
