"""Hooks on the modules of one model: a position for each node, and the outputs of chosen layers."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

from treeflash.decoding.tree import DraftTree


@dataclass(frozen=True, eq=False)
class TreePass:
    """A draft tree after the committed positions 0 .. start - 1.

    Attributes:
        positions: (n,) int32 absolute positions of the nodes.
        ancestors: (n, n) bool; whether a node attends to another.
    """

    positions: mx.array
    ancestors: mx.array

    @classmethod
    def of(cls, tree: DraftTree, start: int) -> TreePass | None:
        """The pass of a tree; None for a chain, which is a plain causal continuation."""
        if tree.is_chain:
            return None
        return cls(mx.array(tree.positions(start)), mx.array(tree.ancestor_mask()))

    def mask(self, start: int, window: int | None) -> mx.array:
        """(n, start + n) bool attention mask of the nodes, within a sliding window if there is one.

        Whether a node lies in a window depends on its position, not on its column.
        """
        n = self.positions.shape[0]
        mask = mx.concatenate([mx.ones((n, start), mx.bool_), self.ancestors], 1)
        if window is not None:
            keys = mx.concatenate([mx.arange(start, dtype=mx.int32), self.positions])
            mask &= self.positions[:, None] - keys < window
        return mask


class _ForwardPass(threading.local):
    """The forward pass that a thread is building: its tree, and where captured outputs go."""

    tree: TreePass | None = None
    outputs: dict[int, mx.array] | None = None


class TreeHooks:
    """What the hooks and the caches of one model need to know about a forward pass.

    MLX evaluates a pass after Python has built it, so this matters only while the model is being
    called. Each thread has its own pass: several may build theirs at the same time. Outside
    `forward_pass` a hooked model computes what it did before.
    """

    def __init__(self) -> None:
        """Hook nothing yet."""
        self._captured: set[int] = set()
        self._pass = _ForwardPass()

    @property
    def tree(self) -> TreePass | None:
        """The tree that this thread's pass verifies; None for a plain causal pass."""
        return self._pass.tree

    @contextmanager
    def forward_pass(
        self, tree: TreePass | None, *, capture: bool
    ) -> Iterator[dict[int, mx.array]]:
        """Describe one call of the model.

        Args:
            tree: None for a plain causal pass.
            capture: whether to keep the outputs of the captured layers.

        Yields:
            Those outputs, filled during the call: (1, n, hidden_size) by layer index.
        """
        outputs: dict[int, mx.array] = {}
        self._pass.tree, self._pass.outputs = tree, outputs if capture else None
        try:
            yield outputs
        finally:
            self._pass.tree, self._pass.outputs = None, None

    def hook_ropes(self, model: nn.Module) -> None:
        """Make the rotary modules of a model rotate each node by its own position."""
        for module in {id(m): m for _, m in model.named_modules() if is_rope(m)}.values():
            _subclass(module, self._rotate)

    def capture(self, layers: Sequence[nn.Module], layer_ids: Collection[int]) -> None:
        """Let a forward pass keep the outputs of these layers."""
        for i in set(layer_ids) - self._captured:
            _subclass(
                layers[i],
                lambda base, layer, *args, i=i, **kwargs: self._keep(
                    i, base(layer, *args, **kwargs)
                ),
            )
            self._captured.add(i)

    def _rotate(
        self, base: Callable[..., mx.array], rope: nn.Module, x: mx.array, *args: Any, **kwargs: Any
    ) -> mx.array:
        if self.tree is None:
            return base(rope, x, *args, **kwargs)
        # A rope has one offset per batch entry: (1, heads, n, d) becomes (n, heads, 1, d).
        kwargs.pop("offset", None)
        return base(rope, x.swapaxes(0, 2), self.tree.positions, *args[1:], **kwargs).swapaxes(0, 2)

    def _keep(self, i: int, output: Any) -> Any:
        if self._pass.outputs is not None:  # some layers return a tuple that starts with it
            self._pass.outputs[i] = output[0] if isinstance(output, tuple) else output
        return output


def is_rope(module: nn.Module) -> bool:
    """Whether a module rotates its input by positions: it is called with `x` and an `offset`.

    This is the interface of `mlx.nn.RoPE`, which the ropes of mlx-lm share. Class names tell less:
    phixtral's `RoPEAttention` is a whole attention layer.
    """
    return list(inspect.signature(type(module).__call__).parameters)[1:3] == ["x", "offset"]


def _subclass(module: nn.Module, call: Callable[..., Any]) -> None:
    """Route the calls of one module, and of no other, through `call(base_call, module, ...)`.

    The module gets its own class. Its parameters and its place in the tree of modules stay,
    so loading, quantising and saving work as before.
    """
    cls = type(module)
    base = cls.__call__
    module.__class__ = type(
        cls.__name__, (cls,), {"__call__": lambda self, *a, **k: call(base, self, *a, **k)}
    )
