"""Hooks on the modules of one model: a position for each node, and the outputs of chosen layers."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from treeflash.decoding.tree import DraftTree
from treeflash_mlx.hybrid_hooks import convolve_nodes, is_short_convolution, rebind
from treeflash_mlx.recurrence import NodePaths, Solver
from treeflash_mlx.recurrent_states import RecurrentCache


@dataclass(frozen=True, eq=False)
class TreePass:
    """Draft trees of one or more texts, each after the committed positions of its text.

    The rows of a text are as many as the largest tree has nodes. Those that its own tree does not
    fill repeat the root, and nothing depends on them.

    Attributes:
        start: committed positions of the shortest text.
        columns: keys that the largest text has, those of its tree included.
        positions: (texts, n) int32 absolute positions of the nodes.
        keys: (texts, columns) int32 absolute positions of the keys.
        visible: (texts, n, columns) bool; whether a node attends to a key.
        index: (texts, 1, n, 1) int32 columns that the nodes are written to; None for one text,
            whose nodes are written after one another.
        paths: for recurrent layers; None if each text goes on by one token, which is a step of
            the model's own.
    """

    start: int
    columns: int
    positions: mx.array
    keys: mx.array
    visible: mx.array
    index: mx.array | None
    paths: NodePaths | None

    @classmethod
    def of(
        cls,
        trees: Sequence[DraftTree],
        starts: Sequence[int],
        spare: int,
        *,
        solve: Solver | None = None,
    ) -> TreePass | None:
        """The pass of the trees of several texts; None for tokens that all continue one text.

        Args:
            trees: of each text.
            starts: its committed positions.
            spare: a column for what is written by rows without a node.
            solve: for recurrent layers, if there are any and a part of a chain may be committed.
        """
        if len(trees) == 1 and (len(trees[0]) == 1 or (trees[0].is_chain and solve is None)):
            return None
        texts, n = len(trees), max(len(tree) for tree in trees)
        columns = max(start + len(tree) for tree, start in zip(trees, starts, strict=True))
        positions, index = np.zeros((2, texts, n), np.int32)
        keys = np.zeros((texts, columns), np.int32)
        visible = np.zeros((texts, n, columns), np.bool_)
        for i, (tree, start) in enumerate(zip(trees, starts, strict=True)):
            size, stop = len(tree), start + len(tree)
            positions[i] = start
            positions[i, :size] = tree.positions(start)
            index[i] = spare
            index[i, :size] = np.arange(start, stop)
            keys[i, :start] = np.arange(start)
            keys[i, start:stop] = positions[i, :size]
            visible[i, :, :start] = True
            visible[i, :size, start:stop] = tree.ancestor_mask()
            visible[i, size:, start] = True
        return cls(
            min(starts),
            columns,
            mx.array(positions),
            mx.array(keys),
            mx.array(visible),
            mx.array(index[:, None, :, None]) if texts > 1 else None,
            NodePaths(trees, n, solve) if solve is not None and n > 1 else None,
        )

    def mask(self, window: int | None, first: int = 0) -> mx.array:
        """The attention mask, bool, within a sliding window if there is one.

        Whether a node lies in a window depends on its position, not on its column.

        Args:
            window: in positions; None for everything.
            first: column of the mask.

        Returns:
            (n, columns - first) for one text, (texts, 1, n, columns - first) for several.
        """
        mask, keys = self.visible[..., first:], self.keys[:, first:]
        if window is not None and window < self.columns:
            mask = mask & (self.positions[:, :, None] - keys[:, None] < window)
        return mask[0] if self.index is None else mask[:, None]


class _ForwardPass(threading.local):
    """The forward pass that a thread is building: its trees, and where captured outputs go."""

    tree: TreePass | None = None
    outputs: dict[int, mx.array] | None = None
    recurrent_cache: RecurrentCache | None = None


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
        """The trees that this thread's pass verifies; None for a plain causal pass."""
        return self._pass.tree

    @property
    def paths(self) -> NodePaths | None:
        """The paths of those trees; None if recurrent layers run as in a plain pass."""
        return None if self.tree is None else self.tree.paths

    def reads(self, cache: RecurrentCache) -> None:
        """A recurrent layer reads its states: the next short convolutions are its own."""
        self._pass.recurrent_cache = cache

    @contextmanager
    def forward_pass(
        self, tree: TreePass | None, *, capture: bool
    ) -> Iterator[dict[int, mx.array]]:
        """Describe one call of the model.

        Args:
            tree: None for a plain causal pass.
            capture: whether to keep the outputs of the captured layers.

        Yields:
            Those outputs, filled during the call: (texts, n, hidden_size) by layer index.
        """
        outputs: dict[int, mx.array] = {}
        self._pass.tree, self._pass.outputs = tree, outputs if capture else None
        try:
            yield outputs
        finally:
            self._pass.tree, self._pass.outputs, self._pass.recurrent_cache = None, None, None

    def hook_ropes(self, model: nn.Module) -> None:
        """Make the rotary modules of a model rotate each node by its own position."""
        for module in {id(m): m for _, m in model.named_modules() if is_rope(m)}.values():
            _subclass(module, self._rotate)

    def hook_recurrent_layers(self, model: nn.Module) -> set[str]:
        """Make the recurrent layers of a model run trees; returns what `rebind` found."""
        found: set[str] = set()
        for module in {id(m): m for _, m in model.named_modules()}.values():
            if is_short_convolution(module):
                _subclass(module, self._convolve)
            else:
                found |= rebind(module, lambda: self.paths)
        return found

    def capture(self, layers: Sequence[nn.Module], layer_ids: Collection[int]) -> None:
        """Let a forward pass keep the outputs of these layers; -1: those of the embeddings."""
        for i in set(layer_ids) - self._captured:
            _subclass(layers[max(i, 0)], self._keep_input if i == -1 else self._keeping(i))
            self._captured.add(i)

    def start_early(self, layers: Sequence[nn.Module]) -> None:
        """Let the device start on a pass after these layers, while Python builds the others."""

        def call(base: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = base(layer, *args, **kwargs)
            mx.async_eval(output)
            return output

        for layer in layers:
            _subclass(layer, call)

    def _rotate(
        self, base: Callable[..., mx.array], rope: nn.Module, x: mx.array, *args: Any, **kwargs: Any
    ) -> mx.array:
        if self.tree is None:
            return base(rope, x, *args, **kwargs)
        # A rope has one offset per batch entry: (texts, heads, n, d) becomes (texts * n, heads, 1,
        # d). Heads are made of rows, so that nothing is copied.
        texts, heads, n, width = x.shape
        kwargs.pop("offset", None)
        nodes = x.swapaxes(1, 2).reshape(texts * n, heads, 1, width)
        rotated = base(rope, nodes, self.tree.positions.reshape(-1), *args[1:], **kwargs)
        return rotated.reshape(texts, n, heads, -1).swapaxes(1, 2)

    def _keeping(self, i: int) -> Callable[..., Any]:
        """The call of a layer whose output is kept."""

        def call(base: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = base(layer, *args, **kwargs)
            if self._pass.outputs is not None:  # some layers return a tuple that starts with it
                self._pass.outputs[i] = output[0] if isinstance(output, tuple) else output
            return output

        return call

    def _keep_input(
        self, base: Callable[..., Any], layer: nn.Module, x: mx.array, *args: Any, **kwargs: Any
    ) -> Any:
        """The call of the first layer, whose input is kept."""
        if self._pass.outputs is not None:
            self._pass.outputs[-1] = x
        return base(layer, x, *args, **kwargs)

    def _convolve(
        self, base: Callable[..., mx.array], module: nn.Module, inputs: mx.array
    ) -> mx.array:
        if self.paths is None:
            return base(module, inputs)
        cache = self._pass.recurrent_cache
        assert cache is not None, "a convolution came before its layer's states were read"
        cache.inputs.append(inputs)
        return convolve_nodes(base, module, inputs, self.paths)


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
