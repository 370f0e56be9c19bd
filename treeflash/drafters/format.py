"""What a published format is: of a drafter's folder, and of a conditional head in it.

The shapes of tensors are read from the class that computes with them. A class that is written once
for PyTorch and MLX names its tensors, and gives their sizes, where it builds its children. With
outlines as children, which have shapes in place of weights, it describes what a checkpoint has to
hold. For example, `linear(8, 4)` is an outline with a `weight` of (4, 8) and a `bias` of (4,); in a
class that keeps it as `self.gate_proj`, these are `gate_proj.weight` and `gate_proj.bias`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from treeflash.drafters.config import DrafterConfig, DrafterShape
from treeflash.drafters.heads.operations import Builders, Head

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


class Parameter(tuple[int, ...]):
    """The shape of a parameter, in its place."""


class Outline:
    """A module that has shapes in place of its parameters."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        vars(self).update({name: Parameter(shape) for name, shape in shapes.items()})


def shapes_of(module: Any, prefix: str = "") -> Shapes:
    """Return the shapes of all tensors of an outline, of a list or of a dictionary of outlines."""
    if isinstance(module, Parameter):
        return {prefix: tuple(module)}
    if isinstance(module, Outline):
        members = vars(module)
    elif isinstance(module, list):
        members = {str(n): child for n, child in enumerate(module)}
    else:
        members = module if isinstance(module, dict) else {}
    shapes: Shapes = {}
    for name, child in members.items():
        shapes |= shapes_of(child, f"{prefix}.{name}" if prefix else name)
    return shapes


def as_outline(kind: Any) -> Any:
    """Make an outline of a class that is written once."""
    return type(kind.__name__, (kind, Outline), {"ops": BUILDERS})


def linear(size: int, out: int, bias: bool = True) -> Outline:
    return Outline(weight=(out, size), **{"bias": (out,)} if bias else {})


def swiglu(size: int, width: int) -> dict[str, Outline]:
    inner = {name: linear(size, width, bias=False) for name in ("gate_proj", "up_proj")}
    return {**inner, "down_proj": linear(width, size, bias=False)}


BUILDERS = Builders(
    linear=linear,
    pair_linear=lambda size, out, bias: linear(2 * size, out, bias),
    embedding=lambda rows, size: Outline(weight=(rows, size)),
    rms_norm=lambda size, eps: Outline(weight=(size,)),
    float32_norm=lambda size, eps: Outline(weight=(size,)),
    float32_bias=lambda size: Outline(bias=(size,)),
    activation=Outline,
    gru=lambda size, state_size: Outline(
        weight_ih_l0=(3 * state_size, size), weight_hh_l0=(3 * state_size, state_size)
    ),
    mlp=lambda config: swiglu(config.hidden_size, config.intermediate_size),
    experts=lambda size, width, count: [swiglu(size, width) for _ in range(count)],
    rotary=lambda config: None,
    children=list,
    named_children=dict,
    parameter=lambda *shape: Parameter(shape),
    module=as_outline,
)
"""What builds the children of an outline."""


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
