"""How checkpoints hold a conditional head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.format import Shapes
from treeflash.drafters.heads.operations import Head


@dataclass(frozen=True, kw_only=True)
class HeadFormat:
    """A conditional head: what it computes, and how checkpoints hold it.

    Attributes:
        module: the class with its mathematics, of which backends make their modules.
        shapes: the shapes of its tensors by canonical name, from the drafter's configuration, the
            size of the target's vocabulary, and the inner width of a TreeFlash head.
        prefix: of the tensors' names, which `DrafterTensors.head` leaves out.
        settings: its keys in `config.json`, and the fields of `DrafterConfig` that they give.
        training_name: its name for `train --head`; None if it cannot be trained.
    """

    family: str
    module: type[Head]
    shapes: Callable[[DrafterConfig, int, int], Shapes]
    prefix: str = ""
    settings: Mapping[str, str]
    training_name: str | None = None
