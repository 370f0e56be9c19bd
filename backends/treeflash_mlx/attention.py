"""Draft trees in the attention of unmodified mlx-lm models.

`TreePass` has the positions, columns and mask of the trees in one forward pass. `TreeHooks` changes
the modules of one model so that they read the pass that is being built: rotary modules rotate each
node by its own position, recurrent layers run along the paths of the trees, and chosen layers keep
their outputs.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.base import scaled_dot_product_attention
from numpy.typing import NDArray

from treeflash.decoding.backend_base import distinct
from treeflash.decoding.tree import DraftTree
from treeflash_mlx.group_attention import FEW_ROWS, attend_by_group, is_unfused
from treeflash_mlx.hybrid import (
    FUNCTIONS,
    NodePaths,
    RecurrentTreeCache,
    Solver,
    convolve_nodes,
    is_short_convolution,
)
from treeflash_mlx.metal_kernels import runs_matrix_kernels
from treeflash_mlx.metal_kernels.attention import (
    MAX_NODES,
    Nodes,
    Shape,
    ancestor_words,
    exact_columns,
    path_nodes,
    runs_shape,
    tree_attention,
    winning_columns,
)
from treeflash_mlx.overrides import rebind, route_calls


@dataclass(frozen=True, eq=False)
class TreePass:
    """Draft trees of one or more sequences, each after the committed positions of its sequence.

    Every sequence has n rows, as many as the largest tree has nodes. Rows without a node repeat the
    root, and no other row depends on them. The nodes of one sequence are written to consecutive
    columns, without an index. There are no paths if each sequence goes on by one token, which the
    model's own functions run.
    """

    starts: mx.array  # (batch, 1) int32 committed positions of each sequence
    start: int  # the first node's column in the shortest sequence
    columns: int  # keys of the longest sequence, with the keys of its tree
    positions: mx.array  # (batch, n) int32 absolute positions of the nodes
    rotary: Sequence[mx.array]  # (batch * n,) rotary positions of the nodes, on one or three axes
    ancestors: mx.array  # (batch, n, n) bool; whether a node attends to a node
    in_windows: mx.array  # the same for layers with a window
    exact_nodes: Nodes | None  # nodes for `tree_attention` in exact mode
    index: mx.array | None  # (batch, 1, n, 1) int32 columns that the nodes are written to
    paths: NodePaths | None  # for recurrent layers
    # masks that layers have got, by window and first column: one for equal layers
    masks: dict[tuple[int | None, int], mx.array] = field(default_factory=dict)
    # shapes of layers that the Metal kernel can run, in the model that ran the pass
    shapes: set[Shape] = field(default_factory=set)

    @classmethod
    def build(
        cls,
        trees: Sequence[DraftTree],
        starts: Sequence[int],
        spare: int,
        *,
        solve: Solver | None = None,
        rotary: Sequence[NDArray[np.int32]] | None = None,
        is_seen: NDArray[np.bool_] | None = None,
        sliding: bool = False,
        exact: bool = False,
        chains_from: float = math.inf,
    ) -> TreePass | None:
        """Return the pass over trees, one per sequence; None if all tokens continue one sequence.

        In `exact` mode there is a pass then too, because all passes must use the same kernels, and
        if there are several tokens and `chains_from` columns, from where on the Metal kernel wins.
        `starts` are the committed positions of each sequence. Rows without a node are written to
        the column `spare`. Recurrent layers `solve`; None without them, or for chains that are
        committed whole. `rotary` are the (n,) rotary positions of each tree, or (3, n) of a single
        chain, where they are not the positions; `is_seen` is (n, n), whether tokens of a single
        chain see others besides the earlier ones, in `sliding` layers alone or in all.
        """
        batch, n = len(trees), max(map(len, trees))
        columns = max(start + len(tree) for tree, start in zip(trees, starts, strict=True))
        is_plain = n == 1 or (trees[0].is_chain and solve is None)
        wins = 1 < n <= MAX_NODES and columns >= chains_from
        if batch == 1 and is_plain and rotary is None and not exact and not wins:
            return None
        positions, index = np.zeros((2, batch, n), np.int32)
        ancestors = np.zeros((batch, n, n), np.bool_)
        for i, (tree, start) in enumerate(zip(trees, starts, strict=True)):
            size, stop = len(tree), start + len(tree)
            positions[i] = start
            positions[i, :size] = tree.positions(start)
            index[i] = spare
            index[i, :size] = np.arange(start, stop)
            ancestors[i, :size, :size] = tree.ancestor_mask()
            ancestors[i, size:, 0] = True
        placed = mx.array(positions)
        turned = [placed.reshape(-1)]
        if rotary is not None:
            axes = np.zeros((rotary[0].ndim * 2 - 1, batch, n), np.int32)
            for i, of_tree in enumerate(rotary):
                for axis, row in zip(axes, np.atleast_2d(of_tree), strict=True):
                    axis[i] = row[0]
                    axis[i, : len(row)] = row
            turned = [mx.array(axis.reshape(-1)) for axis in axes]
        in_windows = mx.array(ancestors if is_seen is None else ancestors | is_seen)
        written = mx.array(index[:, None, :, None]) if batch > 1 else None
        paths = NodePaths(trees, solve) if solve is not None and n > 1 else None
        return cls(
            starts=mx.array(np.array(starts, np.int32)[:, None]),
            start=min(starts),
            columns=columns,
            positions=placed,
            rotary=turned,
            ancestors=mx.array(ancestors) if sliding else in_windows,
            in_windows=in_windows,
            exact_nodes=_exact_nodes(trees, placed, starts, columns) if exact else None,
            index=written,
            paths=paths,
        )

    def mask(self, window: int | None, first: int = 0) -> mx.array:
        """Return the (n, columns - first) bool attention mask; a batch puts (batch, 1) before.

        Whether a key lies in the window of a node depends on its position, not on its column.
        """
        if window is not None and window >= self.columns and self.in_windows is self.ancestors:
            window = None
        if (window, first) not in self.masks:
            self.masks[window, first] = self._mask(window, first)
        return self.masks[window, first]

    @cached_property
    def nodes(self) -> Nodes | None:
        """The nodes as `tree_attention` takes them; None where there are no kernels."""
        if self.exact_nodes is not None:
            return self.exact_nodes
        is_one = self.in_windows is self.ancestors
        if not is_one or self.ancestors.shape[2] > MAX_NODES or not runs_matrix_kernels():
            return None
        words = ancestor_words(self.ancestors)
        return Nodes.of_pass(words, self.positions, self.starts, self.columns)

    def _mask(self, window: int | None, first: int) -> mx.array:
        batch, n = self.positions.shape
        ancestors = self.ancestors if window is None else self.in_windows
        if self.index is None:  # the nodes of one sequence are its last columns
            committed = mx.ones((n, self.start - first), mx.bool_)
            mask = mx.concatenate([committed, ancestors[0]], 1)
            if window is not None:
                keys = mx.concatenate([mx.arange(first, self.start), self.positions[0]])
                mask = mask & (self.positions[0][:, None] - keys < window)
            return mask
        last = mx.arange(self.start, self.columns)  # where sequences end and trees begin
        nodes = mx.broadcast_to(last - self.starts, (batch, len(last)))
        committed, nodes = nodes < 0, mx.clip(nodes, 0, n)
        beyond = mx.zeros((batch, n, 1), mx.bool_)  # columns after the nodes of a sequence
        ancestors = mx.concatenate([ancestors, beyond], 2)
        index = mx.broadcast_to(nodes[:, None], (batch, n, len(last)))
        seen = committed[:, None] | mx.take_along_axis(ancestors, index, 2)
        mask = mx.concatenate([mx.ones((batch, n, self.start - first), mx.bool_), seen], 2)
        if window is not None:
            drafted = mx.take_along_axis(self.positions, mx.minimum(nodes, n - 1), 1)
            before = mx.broadcast_to(mx.arange(first, self.start), (batch, self.start - first))
            keys = mx.concatenate([before, mx.where(committed, last, drafted)], 1)
            mask = mask & (self.positions[:, :, None] - keys[:, None] < window)
        return mask[:, None]


def _exact_nodes(
    trees: Sequence[DraftTree], positions: mx.array, starts: Sequence[int], columns: int
) -> Nodes:
    branches = not all(tree.is_chain for tree in trees)
    paths = path_nodes(trees, positions.shape[1]) if branches else np.zeros((1, 1, 1), np.int32)
    depths = 1 + max(int(tree.depths.max()) for tree in trees)
    placed = mx.array(paths), positions, mx.array(np.array(starts, np.int32))
    return Nodes.of_pass(*placed, columns, depths, branches)


class _ForwardPass(threading.local):
    """The forward pass that a thread is building: its trees and its captured outputs."""

    tree: TreePass | None = None
    outputs: dict[int, mx.array] | None = None
    recurrent_cache: RecurrentTreeCache | None = None
    added: mx.array | None = None  # (layers, 1, n, hidden_size) for the first layers' outputs


class TreeHooks:
    """Hooks on the modules of one model, and the forward pass that they read.

    MLX evaluates a pass after Python has built it, so the hooks act only while the model is being
    called. Each thread has its own pass. Outside `forward_pass` a hooked model computes the same as
    without hooks.
    """

    def __init__(self) -> None:
        # (rotated,) axis of rotary positions by channel of a head; None for one axis.
        self.axes: NDArray[np.int32] | None = None
        self._captured: set[int] = set()
        self._pass = _ForwardPass()

    @property
    def tree(self) -> TreePass | None:
        """The trees that this thread's pass verifies; None for a plain causal pass."""
        return self._pass.tree

    @property
    def paths(self) -> NodePaths | None:
        """The paths of the trees; None if recurrent layers run as in a plain pass."""
        return None if self.tree is None else self.tree.paths

    def enter_recurrent_layer(self, cache: RecurrentTreeCache) -> None:
        """Note that a layer has read its states: the next short convolutions belong to it."""
        self._pass.recurrent_cache = cache

    @contextmanager
    def forward_pass(
        self, tree: TreePass | None, added: mx.array | None = None
    ) -> Iterator[dict[int, mx.array]]:
        """Describe one call of the model; `tree` is None for a plain causal pass.

        `added` are features of images for the outputs of the first layers; see `add_features`.
        It yields (batch, n, hidden_size) outputs of the captured layers, filled during the call.
        """
        outputs: dict[int, mx.array] = {}
        self._pass.tree, self._pass.outputs, self._pass.added = tree, outputs, added
        try:
            yield outputs
        finally:
            self._pass.tree, self._pass.outputs, self._pass.recurrent_cache = None, None, None
            self._pass.added = None

    def hook(self, model: nn.Module) -> set[str]:
        """Make a model run trees; returns the names of its recurrent functions, as `rebind` does.

        Rotary modules rotate each node by its own position, recurrent layers run along the paths,
        and attention runs by the Metal kernel where it wins.
        """
        names: set[str] = set()
        for module in distinct(module for _, module in model.named_modules()):
            if is_rope(module):
                route_calls(module, self._rotate)
            elif is_short_convolution(module):
                route_calls(module, self._convolve)
            else:
                rebind(module, {"scaled_dot_product_attention": attend}, lambda: self.tree)
                names |= rebind(module, FUNCTIONS, lambda: self.paths)
        return names

    def capture(self, layers: Sequence[nn.Module], layer_ids: Collection[int]) -> None:
        """Make `forward_pass` yield the outputs of these layers; -1 stands for the embeddings."""
        for i in set(layer_ids) - self._captured:
            route_calls(layers[max(i, 0)], partial(self._capture, i))
            self._captured.add(i)

    def add_features(self, layers: Sequence[nn.Module]) -> None:
        """Make layers add the features of images to their outputs, before `capture` sees them."""
        for number, layer in enumerate(layers):
            route_calls(layer, partial(self._add, number))

    def submit_early(self, layers: Sequence[nn.Module]) -> None:
        """Let the device start on a pass after these layers, while Python builds the next ones."""

        def call(base: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = base(layer, *args, **kwargs)
            mx.async_eval(output)
            return output

        for layer in layers:
            route_calls(layer, call)

    def _rotate(
        self, base: Callable[..., mx.array], rope: nn.Module, x: mx.array, *args: Any, **kwargs: Any
    ) -> mx.array:
        if self.tree is None:
            return base(rope, x, *args, **kwargs)
        # A rope has one offset per batch entry: (batch, heads, n, d) becomes (batch * n, heads, 1,
        # d). Heads were split from rows, so swapping the axes back copies nothing.
        batch, heads, n, width = x.shape
        kwargs.pop("offset", None)
        nodes = x.swapaxes(1, 2).reshape(batch * n, heads, 1, width)
        rotated, *others = [
            base(rope, nodes, axis, *args[1:], **kwargs) for axis in self.tree.rotary
        ]
        for axis, other in enumerate(others, 1):
            assert self.axes is not None
            channels = np.zeros(width, np.int32)
            channels[: len(self.axes)] = self.axes
            rotated = mx.where(mx.array(channels == axis), other, rotated)
        return rotated.reshape(batch, n, heads, -1).swapaxes(1, 2)

    def _add(
        self, number: int, base: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        output, added = base(layer, *args, **kwargs), self._pass.added
        return output if added is None or number >= len(added) else output + added[number]

    def _capture(
        self, i: int, base: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        output = base(layer, *args, **kwargs)
        if self._pass.outputs is not None:
            # The first layer's input is the embeddings. Some layers return a tuple.
            kept = args[0] if i == -1 else output
            self._pass.outputs[i] = kept[0] if isinstance(kept, tuple) else kept
        return output

    def _convolve(
        self, base: Callable[..., mx.array], module: nn.Module, inputs: mx.array
    ) -> mx.array:
        if self.paths is None:
            return base(module, inputs)
        cache = self._pass.recurrent_cache
        assert cache is not None, "a convolution came before its layer's states were read"
        cache.inputs.append(inputs)
        return convolve_nodes(base, module, inputs, self.paths)


def attend(
    tree: TreePass,
    queries: mx.array,
    keys: mx.array | Sequence[mx.array],
    values: mx.array | Sequence[mx.array],
    cache: object,
    scale: float,
    mask: mx.array | None,
    sinks: mx.array | None = None,
) -> Any:
    """Attend by the Metal kernel, or group by group; NotImplemented for mlx-lm's way."""
    k, v = ((x,) if isinstance(x, mx.array) else x for x in (keys, values))
    if (found := _attend_by_kernel(tree, queries, k, v, cache, scale, mask, sinks)) is not None:
        return found
    if sinks is not None or not (isinstance(keys, mx.array) and isinstance(values, mx.array)):
        return NotImplemented
    if mx.default_device().type != mx.gpu or not is_unfused(queries, keys):
        return NotImplemented
    if not isinstance(mask, mx.array) or (mask.ndim > 2 and mask.shape[1] > 1):
        return NotImplemented
    return attend_by_group(queries, keys, values, scale, mask)


def keep_queries(model: nn.Module) -> None:
    """Let attention to quantised keys leave its queries as they are.

    mlx-lm scales them in place, and layers of IQuest-LoopCoder attend twice with the same queries.
    """

    def call(_: bool, queries: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return scaled_dot_product_attention(mx.array(queries), *args, **kwargs)

    for module in model.modules():
        rebind(module, {"scaled_dot_product_attention": call}, lambda: True)


def _attend_by_kernel(
    tree: TreePass,
    queries: mx.array,
    keys: Sequence[mx.array],
    values: Sequence[mx.array],
    cache: object,
    scale: float,
    mask: mx.array | None,
    sinks: mx.array | None,
) -> mx.array | None:
    """Attend by the Metal kernel; None where it does not run or win.

    Keys and values are one array each, or the three parts of quantised ones. The kernel runs only
    with a mask that the pass has made: models may change a mask.
    """
    bounds = next((x for x, made in tree.masks.items() if made is mask), None)
    if tree.nodes is None or bounds is None:
        return None
    bits = getattr(cache, "bits", 0) if len(keys) > 1 else 0
    if [x.shape for x in keys] != [x.shape for x in values] or (bits and sinks is not None):
        return None
    _, heads, nodes, width = queries.shape
    key_heads, columns, _ = keys[0].shape[1:]
    dtypes = {x.dtype for x in (queries, *keys[bits > 0 :], *values[bits > 0 :])}
    if len(dtypes) > 1 or not runs_shape(width) or columns != tree.columns - bounds[1]:
        return None
    group_size = width // keys[1].shape[3] if bits else 0
    shape = Shape(heads, key_heads, width, queries.dtype, bits, group_size)
    if tree.exact_nodes is not None:
        least = exact_columns(shape)
    else:
        least = winning_columns(shape, few=nodes <= FEW_ROWS)
        tree.shapes.add(shape)
    if columns < least:
        return None
    window, first = bounds
    arrays = queries, keys, values
    return tree_attention(
        *arrays, tree.nodes, scale, window=window, first=first, sinks=sinks, bits=bits
    )


def is_rope(module: nn.Module) -> bool:
    """Return whether a module rotates its input by positions: it takes `x` and an `offset`.

    This is the interface of `mlx.nn.RoPE`, which the rotary modules of mlx-lm share. Class names
    are not enough: phixtral's `RoPEAttention` is a whole attention layer.
    """
    return list(inspect.signature(type(module).__call__).parameters)[1:3] == ["x", "offset"]
