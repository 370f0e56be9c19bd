"""The shapes of a head's tensors, read from the class that computes with them.

A class that is written once for PyTorch and MLX names its tensors, and gives their sizes, where it
builds its children. With outlines as children, which have shapes in place of weights, it describes
what a checkpoint has to hold. For example, `linear(8, 4)` is an outline with a `weight` of (4, 8)
and a `bias` of (4,); in a class that keeps it as `self.gate_proj`, these are `gate_proj.weight` and
`gate_proj.bias`.
"""

from __future__ import annotations

from typing import Any

from treeflash.drafters.format import Shapes
from treeflash.drafters.heads.operations import Builders


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
