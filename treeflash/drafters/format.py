"""What a published format of drafters is: the table that all formats are entries of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from treeflash.drafters.config import DrafterShape

Config: TypeAlias = Mapping[str, Any]
Names: TypeAlias = dict[str, str]
"""Canonical names of tensors, by stored name."""
Shapes: TypeAlias = dict[str, tuple[int, ...]]
"""Shapes of tensors, by canonical name."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A published format of drafters.

    The functions take the `config.json` of a folder and the stored names of its tensors. `detect`
    and `parse` raise what `treeflash.drafters.loading.read_layout` makes errors for users of.

    Attributes:
        kind: whether the layers read a block of slots, or a row for each position (EAGLE-3, MTP).
        detect: tells whether a folder is of this format, if it is of none before it in the table.
        parse: reads the configuration; it also gets the number of the target's layers.
        names: names the drafter's tensors among the stored ones.
        shapes: has the shapes that all tensors and those that may be missing have, from the
            configuration, the size of the target's vocabulary, and the stored shapes.
        keys: a block drafter's own settings that `parse` reads.
    """

    name: str
    kind: Literal["block", "rows"]
    detect: Callable[[Config, Collection[str]], bool]
    parse: Callable[[Config, Collection[str], int], DrafterShape]
    names: Callable[[Config, Collection[str]], Names]
    shapes: Callable[[Any, int, Shapes], tuple[Shapes, Shapes]]
    keys: frozenset[str] = frozenset()
