"""Recurrent layers over a draft tree, in one pass and without a state per node.

The formulas are those of `treeflash.decoding.recurrence`. Everything is computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MANY_NODES = 8
"""From this many on, gates of single channels are applied depth by depth: the decays of all pairs
of nodes would take n * n * key_dim exponentials a head."""


@dataclass(frozen=True, eq=False)
class Writes:
    """What the nodes of a tree write into the state of a layer.

    Attributes:
        state: (1, heads, key_dim, value_dim) before the tree.
        u: (1, heads, n, value_dim).
        k: (1, heads, n, key_dim).
        log_g: (1, heads, n) log decays, or (1, heads, n, key_dim) of single channels.
        transposed: whether the model keeps its state as (1, heads, value_dim, key_dim).
    """

    state: Tensor
    u: Tensor
    k: Tensor
    log_g: Tensor
    transposed: bool = False

    def commit(self, path: Tensor) -> Tensor:
        """The state after a path, as the model keeps it; path: (a,) nodes."""
        u, k, log_g = (x.index_select(2, path) for x in (self.u, self.k, self.log_g))
        if log_g.ndim == 3:
            log_g = log_g[..., None]
        # Decays after each node, summed directly: a difference of two sums would lose digits.
        later = log_g[:, :, 1:].flip(2).cumsum(2).flip(2)
        after = torch.cat([later, torch.zeros_like(log_g[:, :, :1])], 2)
        kept = (k * after.exp()).transpose(-1, -2) @ u
        state = log_g.sum(2).exp()[..., None] * self.state + kept
        return state.transpose(-1, -2).contiguous() if self.transposed else state


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor,
    beta: Tensor,
    state: Tensor,
    ancestors: Tensor,
    parents: NDArray[np.int32],
) -> tuple[Tensor, Tensor]:
    """The gated delta rule on a tree.

    Args:
        q: (1, heads, n, key_dim), normalised and scaled.
        k: (1, heads, n, key_dim), normalised.
        v: (1, heads, n, value_dim).
        log_g: (1, heads, n), or (1, heads, n, key_dim) for gates of single channels.
        beta: (1, heads, n, 1).
        state: (1, heads, key_dim, value_dim).
        ancestors: (n, n) bool, as `DraftTree.ancestor_mask`.
        parents: (n,) as in `DraftTree`.

    Returns:
        (1, heads, n, value_dim) outputs, and the same of what the nodes write.
    """
    if log_g.ndim == 4 and len(parents) >= MANY_NODES:
        return _by_depth(q, k, v, log_g, beta, state, parents)
    pairs, total = _decays(log_g, ancestors)
    decay = total.exp()
    right = beta * (v - (decay * k) @ state)
    # The solver reads the lower triangle, and takes the diagonal to be 1.
    system = beta * _products(k, k, pairs)
    u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return (decay * q) @ state + _products(q, k, pairs) @ u, u


def linear_rule(
    q: Tensor, k: Tensor, u: Tensor, log_g: Tensor, state: Tensor, ancestors: Tensor
) -> Tensor:
    """Gated linear attention on a tree; shapes as in `delta_rule`, `u` is what the nodes write."""
    pairs, total = _decays(log_g, ancestors)
    return (total.exp() * q) @ state + _products(q, k, pairs) @ u


def _decays(log_g: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
    """Decays from node j to node i, 0 where i does not see j; and logs from the state to i.

    (1, heads, n, n) and (1, heads, n, 1), or both with key_dim as the last axis. Differences are
    masked before the exponential: off the paths they are positive and overflow.
    """
    below = ancestors.to(log_g.dtype)
    if log_g.ndim == 3:
        total = log_g @ below.T
        difference = total[..., :, None] - total[..., None, :]
        return difference.masked_fill(~ancestors, float("-inf")).exp(), total[..., None]
    total = below @ log_g
    difference = total[..., :, None, :] - total[..., None, :, :]
    return difference.masked_fill(~ancestors[..., None], float("-inf")).exp(), total


def _products(x: Tensor, k: Tensor, pairs: Tensor) -> Tensor:
    """(1, heads, n, n) decayed products of rows."""
    if pairs.ndim == 4:
        return (x @ k.transpose(-1, -2)) * pairs
    return (x[..., :, None, :] * k[..., None, :, :] * pairs).sum(-1)


def _by_depth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor,
    beta: Tensor,
    state: Tensor,
    parents: NDArray[np.int32],
) -> tuple[Tensor, Tensor]:
    """`delta_rule` depth by depth.

    The decayed keys on a node's path are those of its parent, decayed once more. That takes n *
    depth * key_dim products, and no exponentials but those of the gates.
    """
    depths = np.zeros(len(parents), np.int32)
    for node in range(1, len(parents)):
        depths[node] = depths[parents[node]] + 1
    gates, out, written = log_g.exp(), torch.empty_like(v), torch.empty_like(v)
    keys = k.new_zeros(*k.shape[:2], 1, 0, k.shape[-1])  # (1, heads, nodes, depth, key_dim)
    values = v.new_zeros(*v.shape[:2], 1, 0, v.shape[-1])
    whole = torch.ones_like(k[:, :, :1])
    place = {-1: 0}
    for depth in range(int(depths.max()) + 1):
        nodes = np.flatnonzero(depths == depth).tolist()
        above = torch.tensor([place[int(parents[i])] for i in nodes], device=k.device)
        now = torch.tensor(nodes, device=k.device)
        gate, key, query = gates[:, :, now], k[:, :, now], q[:, :, now]
        whole = whole[:, :, above] * gate
        keys, values = keys[:, :, above] * gate[..., None, :], values[:, :, above]
        known = (whole * key) @ state + ((keys @ key[..., None]) * values).sum(-2)
        u = beta[:, :, now] * (v[:, :, now] - known)
        keys = torch.cat([keys, key[..., None, :]], -2)
        values = torch.cat([values, u[..., None, :]], -2)
        out[:, :, now] = (whole * query) @ state + ((keys @ query[..., None]) * values).sum(-2)
        written[:, :, now] = u
        place = {node: row for row, node in enumerate(nodes)}
    return out, written
