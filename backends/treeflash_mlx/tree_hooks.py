"""Hooks on the modules of one model: a position per node, and the outputs of chosen layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx import nn

from treeflash.decoding.tree import DraftTree

ROPES = ("rope", "rotary")


@dataclass(frozen=True, eq=False)
class TreePass:
    """A draft tree under the committed positions 0 .. start - 1.

    Attributes:
        positions: (n,) int32 absolute positions of the nodes.
        ancestors: (n, n) bool; whether a node sees another.
    """

    positions: mx.array
    ancestors: mx.array

    @classmethod
    def of(cls, tree: DraftTree, start: int) -> TreePass | None:
        """The pass of a tree; None for a chain, which is but a causal continuation."""
        if tree.is_chain:
            return None
        return cls(mx.array(tree.positions(start)), mx.array(tree.ancestor_mask()))

    def mask(self, start: int, window: int | None) -> mx.array:
        """(n, start + n) bool: what the nodes see, within a window of positions if there is one.

        A node's place in a window follows from its position, not from its column.
        """
        n = self.positions.shape[0]
        mask = mx.concatenate([mx.ones((n, start), mx.bool_), self.ancestors], 1)
        if window is not None:
            keys = mx.concatenate([mx.arange(start, dtype=mx.int32), self.positions])
            mask &= self.positions[:, None] - keys < window
        return mask


@dataclass(eq=False)
class TreeHooks:
    """What the hooks and the caches of one model must know about the forward pass in the making.

    MLX runs a pass after Python has written it down, so a scope matters only while a model is
    being called. With nothing set, a hooked model is the model it was.

    Attributes:
        tree: the tree that passes through; None for a plain causal pass.
        outputs: filled with the outputs of captured layers, (1, n, hidden_size) by layer index;
            None when nobody asks.
    """

    tree: TreePass | None = None
    outputs: dict[int, mx.array] | None = None
    captured: set[int] = field(default_factory=set)

    @contextmanager
    def running(self, tree: TreePass | None, *, capture: bool) -> Iterator[dict[int, mx.array]]:
        """Set the scope for one call of the model; gives the outputs that it captures."""
        outputs: dict[int, mx.array] = {}
        self.tree, self.outputs = tree, outputs if capture else None
        try:
            yield outputs
        finally:
            self.tree, self.outputs = None, None

    def follow(self, model: nn.Module) -> None:
        """Make the rotary modules of a model rotate each node by its own position."""
        for module in {id(m): m for _, m in model.named_modules() if _is_rope(m)}.values():
            _subclass(module, self._rotate)

    def capture(self, layers: Sequence[nn.Module], layer_ids: Collection[int]) -> None:
        """Make those layers leave their outputs here; the other layers' are not kept."""
        for i in set(layer_ids) - self.captured:
            _subclass(
                layers[i],
                lambda base, layer, *args, i=i, **kwargs: self._keep(
                    i, base(layer, *args, **kwargs)
                ),
            )
            self.captured.add(i)

    def _rotate(
        self, base: Callable[..., mx.array], rope: nn.Module, x: mx.array, *args: Any, **kwargs: Any
    ) -> mx.array:
        if self.tree is None:
            return base(rope, x, *args, **kwargs)
        # A rope has one offset per batch entry: (1, heads, n, d) becomes (n, heads, 1, d).
        kwargs.pop("offset", None)
        return base(rope, x.swapaxes(0, 2), self.tree.positions, *args[1:], **kwargs).swapaxes(0, 2)

    def _keep(self, i: int, output: Any) -> Any:
        if self.outputs is not None:  # some layers return more than their output
            self.outputs[i] = output[0] if isinstance(output, tuple) else output
        return output


def _is_rope(module: nn.Module) -> bool:
    return any(name in type(module).__name__.lower() for name in ROPES)


def _subclass(module: nn.Module, call: Callable[..., Any]) -> None:
    """Route the calls of one module, and of no other, through `call(base_call, module, ...)`.

    The module gets a class of its own. Its parameters and its place in the tree of modules stay,
    so that loading, quantising and saving know it as before.
    """
    cls = type(module)
    base = cls.__call__
    module.__class__ = type(
        cls.__name__, (cls,), {"__call__": lambda self, *a, **k: call(base, self, *a, **k)}
    )
