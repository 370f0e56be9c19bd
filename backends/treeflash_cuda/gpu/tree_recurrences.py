"""The recurrences of a pass over trees of equally many nodes, as CUDA graphs need them.

All trees run at once, on states in the slots of an arena.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treeflash_cuda.gpu.state_arena import StateArena
from treeflash_cuda.operations import Operations
from treeflash_cuda.recurrence import TreeNodes
from treeflash_cuda.recurrent_states import MATRIX, TAIL, Key


class TreeRecurrences:
    """`Recurrences` over trees, and what recurrent layers of transformers' models need of them."""

    def __init__(
        self,
        operations: Operations,
        arena: StateArena,
        slots: Tensor,  # (trees,) int32 slots of the states before the trees
        nodes: TreeNodes,
    ) -> None:
        self.operations, self.arena, self.slots, self.nodes = operations, arena, slots, nodes
        self._windows: dict[int, Tensor] = {}  # made once for all layers
        self._inputs: dict[Key, Tensor] = {}
        self._written: dict[Key, tuple[Tensor, ...]] = {}

    def convolve(self, layer: int, rows: Tensor, filters: Tensor, activation: str) -> Tensor:
        return self.convolve_rows((TAIL, layer, 0), rows, filters, None, activation)

    def delta_rule(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor
    ) -> Tensor:
        rows = [self.by_tree(x) for x in (q, k, v, log_g[..., None], beta)]
        scale = k.shape[2] ** -0.5
        return self.recur((MATRIX, layer, 0), *rows, normalise=True, scale=scale).flatten(0, 1)

    def by_tree(self, x: Tensor) -> Tensor:
        """View (trees * n, ...) rows as (trees, n, ...)."""
        return x.unflatten(0, self.nodes.ancestors.shape[:2])

    def convolve_rows(
        self,
        key: Key,  # of the tail
        rows: Tensor,  # (trees * n, channels)
        weight: Tensor,  # (channels, kernel)
        bias: Tensor | None,  # (channels,)
        activation: str | None,  # a name in transformers
    ) -> Tensor:
        """Convolve rows along the paths of all trees: (trees * n, channels)."""
        group, i = self.arena.places[key]
        kernel = weight.shape[1]
        if kernel not in self._windows:
            self._windows[kernel] = tree_windows(self.nodes.ancestors, kernel)
        out, self._inputs[key] = self.operations.convolve_paths(
            *(self.by_tree(rows), self.arena.tensors[group][:, i], self.slots),
            *(self._windows[kernel], weight, bias, activation),
        )
        return out.flatten(0, 1)

    def recur(
        self,
        key: Key,  # of the matrix
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: Tensor,
        beta: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """Run `tree_recurrence` on all trees: (trees, n, heads, value_dim)."""
        group, i = self.arena.places[key]
        states = self.arena.matrices(group)[:, i]
        out, written, keys = self.operations.tree_recurrence(
            q, k, v, log_g, beta, states, self.slots, self.nodes, **options
        )
        self._written[key] = written, keys, log_g.transpose(1, 2)
        return out

    def outputs(self) -> list[Tensor]:
        """Return `TreeWrites.outputs`."""
        tails = self.arena.groups[: self.arena.tails]
        found = [torch.stack([self._inputs[key] for key in keys]) for keys in tails]
        for keys in self.arena.groups[self.arena.tails :]:
            parts = zip(*(self._written[key] for key in keys), strict=True)
            found += [torch.stack(part) for part in parts]
        return found


def tree_windows(ancestors: Tensor, kernel: int) -> Tensor:
    """Compute `convolution_windows` of each tree on the device: (trees, n, kernel) int64."""
    back = torch.arange(kernel - 1, -1, -1, device=ancestors.device)
    depths = ancestors.sum(2, keepdim=True) - 1 - back  # negative in the tail
    nodes = ancestor_paths(ancestors).long().gather(2, depths.clamp(min=0))
    return kernel - 1 + torch.where(depths < 0, depths, nodes)


def ancestor_paths(ancestors: Tensor) -> Tensor:
    """Return (t, n, n) int32 rows of each node's ancestors by depth, from (t, n, n) bool ancestors.

    Entries beyond a node's own depth are 0.
    """
    n = ancestors.shape[-1]
    rank = ancestors.cumsum(-1) - 1
    rows = torch.arange(n, dtype=torch.int32, device=ancestors.device).expand_as(ancestors)
    paths = rows.new_zeros(*ancestors.shape[:-1], n + 1)
    return paths.scatter_(-1, rank.masked_fill(~ancestors, n), rows)[..., :n]
