"""Recurrent layers over draft trees: all nodes in one pass, and the state after a path.

The formulas are those of `treeflash.decoding.recurrence`, with states of shape
(value_dim, key_dim), as mlx-lm keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from treeflash.decoding.recurrence import convolution_windows
from treeflash.decoding.tree import DraftTree

Solver: TypeAlias = Callable[[mx.array, mx.array, int], mx.array]
"""Solves a triangular system; see `treeflash_mlx.solvers`."""


class NodePaths:
    """The ancestors of the nodes of several trees, for the recurrent layers of one pass.

    A row that its tree does not fill continues the committed text, as a root does.

    Attributes:
        texts: how many there are.
        rows: n, of each text.
        depth: of the deepest node; a root has depth 0.
        ancestors: (texts, 1, n, n) bool; [i, 0, j, k] tells whether k is j or an ancestor of j.
        solve: for the delta rule.
    """

    def __init__(self, trees: Sequence[DraftTree], rows: int, solve: Solver) -> None:
        """Describe the trees, each of at most `rows` nodes."""
        self.solve = solve
        self.texts, self.rows = len(trees), rows
        self.depth = max(int(tree.depths.max()) for tree in trees)
        ancestors = np.zeros((self.texts, 1, rows, rows), np.bool_)
        ancestors[:] = np.eye(rows, dtype=np.bool_)
        self._parents = np.full((self.texts, rows), -1, np.int32)
        for i, tree in enumerate(trees):
            size = len(tree)
            ancestors[i, 0, :size, :size] = tree.ancestor_mask()
            self._parents[i, :size] = tree.parents
        self.ancestors = mx.array(ancestors)
        self._windows: dict[int, mx.array] = {}

    def windows(self, kernel: int) -> mx.array:
        """(texts, n, kernel) int32; `convolution_windows` of each text, for all layers."""
        if kernel not in self._windows:
            rows = np.stack([convolution_windows(parents, kernel) for parents in self._parents])
            self._windows[kernel] = mx.array(rows)
        return self._windows[kernel]


@dataclass(frozen=True, eq=False)
class Writes:
    """What the nodes of a pass write into matrix states, each on the state after its parent.

    Attributes:
        values: (texts, heads, n, value_dim) float32, u in the formulas.
        keys: (texts, heads, n, key_dim) float32.
        log_decays: (texts, heads, n, 1) float32, or (texts, heads, n, key_dim) for a gate per key
            channel; those of the nodes themselves, not summed.
        keys_first: whether the model keeps its states as (key_dim, value_dim).
    """

    values: mx.array
    keys: mx.array
    log_decays: mx.array
    keys_first: bool = False

    def after(self, state: mx.array | None, nodes: mx.array, kept: mx.array) -> mx.array:
        """The states after a path of each text.

        Args:
            state: as the model keeps it, before the path; None for zeros.
            nodes: (texts, a) int32 of the paths, in order.
            kept: (texts, a) bool; which of them are committed, the first ones. A text without any
                keeps its state as it is.
        """
        kept = kept[:, None, :, None]
        values, keys, log_decays = (
            mx.take_along_axis(x, mx.broadcast_to(nodes[:, None, :, None], shape), 2)
            for x in (self.values, self.keys, self.log_decays)
            for shape in [(*x.shape[:2], nodes.shape[1], x.shape[3])]
        )
        values, log_decays = mx.where(kept, values, 0), mx.where(kept, log_decays, 0)
        # Summed directly: where much has decayed, a difference of two sums loses its digits.
        later = mx.cumsum(log_decays, axis=2, reverse=True, inclusive=False)
        written = values.swapaxes(2, 3) @ (keys * mx.exp(later))
        if state is None:
            return written.swapaxes(2, 3) if self.keys_first else written
        decay = mx.exp(log_decays.sum(2, keepdims=True))
        if self.keys_first:
            decay, written = decay.swapaxes(2, 3), written.swapaxes(2, 3)
        return (decay * state.astype(mx.float32) + written).astype(state.dtype)


def run_tree(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    log_decays: mx.array,
    state: mx.array,
    paths: NodePaths,
    betas: mx.array | None = None,
) -> tuple[mx.array, Writes]:
    """The outputs of a recurrent layer at all nodes; nothing is written to the state.

    Args:
        queries: (texts, heads, n, key_dim) float32.
        keys: the same shape.
        values: (texts, heads, n, value_dim) float32.
        log_decays: as in `Writes`.
        state: (texts, heads, value_dim, key_dim) float32.
        paths: of the nodes.
        betas: (texts, heads, n, 1) float32 of the delta rule; None for linear attention.

    Returns:
        (texts, heads, n, value_dim) float32, and what a commit needs.
    """
    totals = paths.ancestors.astype(mx.float32) @ log_decays
    decays = mx.exp(totals)
    products = path_products(keys, totals, paths)
    if betas is not None:
        targets = betas * (values - (decays * keys) @ state.swapaxes(2, 3))
        values = paths.solve(betas * products(keys), targets, paths.depth)
    outputs = (decays * queries) @ state.swapaxes(2, 3) + products(queries) @ values
    return outputs, Writes(values, keys, log_decays)


def path_products(
    keys: mx.array, totals: mx.array, paths: NodePaths
) -> Callable[[mx.array], mx.array]:
    """A function that multiplies the row of each node with the decayed keys on its path.

    It takes (texts, heads, n, key_dim) and returns (texts, heads, n, n), 0 off the paths.

    Args:
        keys: (texts, heads, n, key_dim).
        totals: log decays, summed over each node and its ancestors.
        paths: of the nodes.
    """
    if totals.shape[3] == 1:
        # Masked before exp: off the paths the differences are positive and overflow.
        differences = mx.where(paths.ancestors, totals - totals.swapaxes(2, 3), -mx.inf)
        pairs = mx.exp(differences)
        return lambda rows: (rows @ keys.swapaxes(2, 3)) * pairs
    # A gate per channel does not leave the sum over channels. The keys of each node's path are
    # gathered: exponentials for all pairs of nodes would be several times as many.
    length = paths.depth + 1
    nodes = paths.windows(length) - (length - 1)
    texts, heads, n, width = keys.shape
    on_path = (nodes >= 0)[:, None, :, :, None]
    index = mx.maximum(nodes, 0).reshape(texts, 1, n * length, 1)
    index = mx.broadcast_to(index, (texts, heads, n * length, width))
    gathered_totals, gathered = (
        mx.take_along_axis(x, index, 2).reshape(texts, heads, n, length, width)
        for x in (totals, keys)
    )
    differences = mx.where(on_path, totals[:, :, :, None] - gathered_totals, -mx.inf)
    gathered = gathered * mx.exp(differences)
    # What is not on a path goes to a column of its own.
    columns = mx.where(nodes >= 0, nodes, n)[:, None]
    columns = mx.broadcast_to(columns, (texts, heads, n, length))

    def products(rows: mx.array) -> mx.array:
        found = (gathered @ rows[..., None])[..., 0]
        zeros = mx.zeros((texts, heads, n, n + 1), found.dtype)
        return mx.put_along_axis(zeros, columns, found, 3)[..., :n]

    return products
