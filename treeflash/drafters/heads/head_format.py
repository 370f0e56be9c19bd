"""How checkpoints hold a conditional head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.format import Shapes
from treeflash.drafters.heads.operations import Head
from treeflash.drafters.heads.shapes import as_outline, shapes_of

CONFIDENCE_PREFIX = "confidence_head."


@dataclass(frozen=True, kw_only=True)
class HeadFormat:
    """A conditional head: what it computes, and how checkpoints hold it.

    Attributes:
        module: the class with its mathematics, which backends make a module of their framework.
        prefix: the beginning of all names of tensors, except in a confidence head;
            `DrafterTensors.head` leaves it out.
        settings: its keys in `config.json`, and the fields of `DrafterConfig` that they give.
        training_name: its name for `train --head`; None if it cannot be trained.
    """

    family: str
    module: type[Head]
    prefix: str = ""
    settings: Mapping[str, str]
    training_name: str | None = None

    def shapes(self, config: DrafterConfig, vocab_size: int, inner_size: int) -> Shapes:
        """Return the shapes of its tensors by canonical name.

        `vocab_size` is the target's, `inner_size` the inner width of a TreeFlash head.
        """
        module = as_outline(self.module)(config, inner_size, vocab_size)
        return {
            name if name.startswith(CONFIDENCE_PREFIX) else self.prefix + name: shape
            for name, shape in shapes_of(module).items()
        }
