"""Recurrent layers on draft trees, in PyTorch: what defines the results of the kernels.

`treeflash.decoding.hybrid` has the formulas. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.hybrid import depth_first
from treeflash.decoding.tree import DraftTree

MANY_NODES = 8
"""From this many nodes on, gates of single channels are applied depth by depth: the decays of all
pairs of nodes would take n * n * key_dim exponentials a head."""
L2_EPS = 1e-6
CHUNK = 64
"""Consecutive tokens whose corrections of each other are solved at once."""
PATH_COLUMNS = 4
"""Columns of a path before its nodes: the tree, the slots of the states before and after it, and
the number of its nodes."""


@dataclass(frozen=True, eq=False)
class TreeNodes:
    """The nodes of the trees that a recurrence runs at once, n of each tree."""

    # (trees, n, n) bool, as `DraftTree.ancestor_mask`. A node that is not its own ancestor is a
    # copy of the root that fills a tree up.
    ancestors: Tensor
    parents: NDArray[np.int32] | None = None  # (n,) of a single tree, if the host knows them
    visits: Tensor | None = None  # (trees, n, 3) int32, see `depth_first`; kernels need them
    counts: Tensor | None = None  # (trees,) int32 nodes without copies of the root

    @classmethod
    def of(cls, ancestors: Tensor, visits: Tensor, counts: Tensor) -> TreeNodes:
        """Take the result of `plan_nodes` as int32 tensors."""
        return cls(ancestors.bool(), visits=visits, counts=counts)


def plan_nodes(drafts: Sequence[DraftTree], trees: int, nodes: int) -> list[NDArray[np.int32]]:
    """Return the arrays of `TreeNodes.of`: trees filled up to `nodes` with copies of their roots.

    The trees after the last draft are copies of the first.
    """
    ancestors = np.zeros((trees, nodes, nodes), np.int32)
    visits = np.full((trees, nodes, 3), -1, np.int32)
    counts = np.zeros(trees, np.int32)
    for i, tree in enumerate(drafts):
        counts[i] = n = len(tree)
        ancestors[i, :n, :n] = tree.ancestor_mask()
        ancestors[i, n:, 0] = 1
        visits[i, :n], _ = depth_first(tree.parents)
    for x in (ancestors, visits, counts):
        x[len(drafts) :] = x[0]
    return [ancestors, visits, counts]


def convolve_paths(
    rows: Tensor,  # (trees, n, channels) inputs of the nodes
    tails: Tensor,  # (slots, channels, kernel - 1) last inputs before the trees
    slots: Tensor,  # (trees,) int32 or int64 place of each tree's tail
    windows: Tensor,  # (trees, n, kernel) int64 inputs of each node, see `convolution_windows`
    weight: Tensor,  # (channels, kernel)
    bias: Tensor | None = None,  # (channels,)
    activation: str | None = None,  # a name in transformers
) -> tuple[Tensor, Tensor]:
    """Convolve each channel along the paths of trees, and return what a commit needs.

    Returns:
        (trees, n, channels) outputs, and the (trees, kernel - 1 + n, channels) inputs: tails, then
        rows.
    """
    inputs = torch.cat([tails.index_select(0, slots).mT, rows], 1)
    index = windows.flatten(1)[:, :, None].expand(-1, -1, inputs.shape[2])
    read = inputs.gather(1, index).unflatten(1, windows.shape[1:]).mT
    return weigh_windows(read, weight, bias, activation), inputs


def convolve_rows(
    inputs: Tensor,  # (rows, channels): last inputs of sequences, and the inputs of their rows
    windows: Tensor | None,  # (n, kernel) int64 inputs of each row; None for all in order
    filters: Tensor,  # (channels, kernel)
) -> Tensor:
    """Convolve each channel: (n, channels) in the dtype of the inputs; sums are in float32."""
    weights = filters.float().mT.contiguous()
    kernel = len(weights)
    if windows is not None:
        return (inputs[windows].float() * weights).sum(1).to(inputs.dtype)
    n, wide = len(inputs) - kernel + 1, inputs.float()
    out = wide[:n] * weights[0]
    for i in range(1, kernel):
        out.addcmul_(wide[i : i + n], weights[i])
    return out.to(inputs.dtype)


def weigh_windows(
    windows: Tensor,  # (..., kernel)
    weight: Tensor,  # of a shape like windows, as is the bias without the last axis
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Return the (...) outputs of a convolution in the dtype of its inputs; sums are in float32."""
    out = (windows.float() * weight.float()).sum(-1)
    if bias is not None:
        out = out + bias.float()
    out = out.to(weight.dtype)
    if activation is not None:
        from transformers.activations import ACT2FN  # takes time, and few targets are recurrent

        out = ACT2FN[activation](out)
    return out.to(windows.dtype)


def tree_recurrence(
    q: Tensor,  # (trees, n, key_heads, key_dim)
    k: Tensor,  # (trees, n, key_heads, key_dim)
    v: Tensor,  # (trees, n, heads, value_dim)
    log_g: Tensor,  # (trees, n, heads, 1) log decays, or (trees, n, heads, key_dim) of channels
    beta: Tensor | None,  # (trees, n, heads) of the delta rule; None for linear attention
    states: Tensor,  # (slots, heads, key_dim, value_dim) before the trees
    slots: Tensor,  # (trees,) int32 or int64 place of each tree's state
    nodes: TreeNodes,
    *,
    normalise: bool = False,  # whether keys and queries become unit vectors
    scale: float = 1.0,  # factor on the queries
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a recurrence on trees, and return what a commit needs.

    Returns:
        (trees, n, heads, value_dim) outputs in the dtype of v; in float32 the (trees, heads, n,
        value_dim) values that the nodes write, and their (trees, heads, n, key_dim) keys.
    """
    q, k, written, gates = by_heads(q, k, v, log_g, normalise=normalise, scale=scale)
    state = states.index_select(0, slots).float()
    if beta is None:
        out = linear_rule(q, k, written, gates, state, nodes)
    else:
        factors = beta.transpose(1, 2).float()[..., None]
        out, written = delta_rule(q, k, written, gates, factors, state, nodes)
    return out.transpose(1, 2).to(v.dtype), written, k


def by_heads(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, *, normalise: bool = False, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return arguments of `tree_recurrence` in float32, by head: (trees, heads, n, ...) each."""
    repeats = v.shape[2] // k.shape[2]
    q, k = (x.float().repeat_interleave(repeats, 2) for x in (q, k))
    if normalise:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS) for x in (q, k))
    q, k, v, log_g = (x.transpose(1, 2) for x in (q * scale, k, v.float(), log_g.float()))
    return q, k, v, log_g


def commit_recurrence(
    written: Tensor,  # (layers, trees, heads, n, value_dim)
    keys: Tensor,  # (layers, trees, heads, n, key_dim)
    log_g: Tensor,  # (layers, trees, heads, n, 1 or key_dim)
    states: Tensor,  # (slots, layers, heads, key_dim, value_dim), changed in place
    paths: Tensor,  # (sequences, 4 + n) int32, see `PATH_COLUMNS`
) -> None:
    """Write the states after the paths of some trees, from what `tree_recurrence` returned."""
    trees, before, after, counts = paths[:, :PATH_COLUMNS].long().unbind(1)
    path = paths[:, PATH_COLUMNS:].long()
    index = path[None, :, None, :, None]
    is_beyond = torch.arange(path.shape[1], device=path.device) >= counts[:, None]
    is_beyond = is_beyond[None, :, None, :, None]
    u, k, gates = (
        x[:, trees].gather(3, index.expand(len(x), -1, x.shape[2], -1, x.shape[4]))
        for x in (written, keys, log_g)
    )
    # A row whose value and log decay are 0 changes nothing.
    update, decay = state_update(u.masked_fill(is_beyond, 0), k, gates.masked_fill(is_beyond, 0))
    old = states.index_select(0, before).transpose(0, 1)
    states.index_copy_(0, after, torch.addcmul(update, decay, old).transpose(0, 1))


def state_update(u: Tensor, k: Tensor, log_g: Tensor) -> tuple[Tensor, Tensor]:
    """Return what rows that follow one another add to a state, and the factor of the state before.

    Args:
        u: (..., n, value_dim).
        k: (..., n, key_dim).
        log_g: (..., n, 1 or key_dim).

    Returns:
        (..., key_dim, value_dim) and (..., 1 or key_dim, 1).
    """
    return (k * decays_after(log_g)).transpose(-1, -2) @ u, log_g.sum(-2).exp()[..., None]


def decays_after(log_g: Tensor) -> Tensor:
    """Return the (..., n, 1 or key_dim) decays of what rows write until after the last row.

    They are summed directly: a difference of two sums would lose digits.
    """
    if log_g.shape[-2] == 1:
        return torch.ones_like(log_g)
    return F.pad(log_g[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1)).exp()


def delta_rule(
    q: Tensor,  # (trees, heads, n, key_dim), normalised and scaled
    k: Tensor,  # (trees, heads, n, key_dim), normalised
    v: Tensor,  # (trees, heads, n, value_dim)
    log_g: Tensor,  # (trees, heads, n, 1), or (trees, heads, n, key_dim) for gates of channels
    beta: Tensor,  # (trees, heads, n, 1)
    state: Tensor,  # (trees, heads, key_dim, value_dim)
    nodes: TreeNodes,
) -> tuple[Tensor, Tensor]:
    """Compute the gated delta rule on trees: (trees, heads, n, value_dim), written values."""
    if q.shape[2] == 1:  # it corrects nothing that another node writes
        decay = log_g.exp()
        u = beta * (v - (decay * k) @ state)
        return (decay * q) @ state + (q * k).sum(-1, keepdim=True) * u, u
    if log_g.shape[-1] > 1 and nodes.parents is not None and len(nodes.parents) >= MANY_NODES:
        return _by_depth(q, k, v, log_g, beta, state, nodes.parents)
    pairs, total = _decays(log_g, nodes.ancestors)
    decay = total.exp()
    right = beta * (v - (decay * k) @ state)
    # The solver reads the lower triangle, and takes the diagonal to be 1.
    system = beta * _products(k, k, pairs)
    u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return (decay * q) @ state + _products(q, k, pairs) @ u, u


def delta_rule_of_tokens(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gated delta rule on the next tokens of one sequence.

    Takes the arguments of `delta_rule` with one decay for a head; returns the outputs, and the
    state after the tokens. All chunks of tokens are prepared at once, then run one by one.
    """
    n = q.shape[2]
    size = min(n, CHUNK)
    # The tokens that fill the last chunk change nothing.
    q, k, v, log_g, beta = (
        F.pad(x[0], (0, 0, 0, -n % size)).unflatten(1, (-1, size)).transpose(0, 1)
        for x in (q, k, v, log_g, beta)
    )
    pairs, total = _decays(log_g, q.new_ones(1, size, size, dtype=torch.bool).tril())
    decay = total.exp()
    right = beta * torch.cat([v, decay * k], -1)
    solved = torch.linalg.solve_triangular(
        beta * _products(k, k, pairs), right, upper=False, unitriangular=True
    )
    values, known = solved.split([v.shape[-1], k.shape[-1]], -1)
    scores, reads, outputs = _products(q, k, pairs), decay * q, []
    keys, kept = (k * decays_after(log_g)).mT, decay[:, :, -1:]
    state = state[0]
    for chunk in range(len(q)):
        u = values[chunk] - known[chunk] @ state
        outputs.append(reads[chunk] @ state + scores[chunk] @ u)
        state = torch.addcmul(keys[chunk] @ u, kept[chunk], state)
    return torch.cat(outputs, 1)[None, :, :n], state[None]


def linear_rule(
    q: Tensor, k: Tensor, u: Tensor, log_g: Tensor, state: Tensor, nodes: TreeNodes
) -> Tensor:
    """Compute gated linear attention on trees, as `delta_rule`; `u` are the values written."""
    pairs, total = _decays(log_g, nodes.ancestors)
    return (total.exp() * q) @ state + _products(q, k, pairs) @ u


def _decays(log_g: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
    """Return decays from node j to i, 0 where i does not see j; log decays from the state.

    (trees, heads, n, n, 1 or key_dim) and (trees, heads, n, 1 or key_dim). Differences are masked
    before the exponential: off the paths they are positive and overflow.
    """
    total = ancestors[:, None].to(log_g.dtype) @ log_g
    difference = total[..., :, None, :] - total[..., None, :, :]
    return difference.masked_fill(~ancestors[:, None, :, :, None], float("-inf")).exp(), total


def _products(x: Tensor, k: Tensor, pairs: Tensor) -> Tensor:
    """Return the (trees, heads, n, n) decayed products of rows."""
    if pairs.shape[-1] == 1:
        return (x @ k.transpose(-1, -2)) * pairs[..., 0]
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
    """Compute `delta_rule` for a single tree, depth by depth.

    The decayed keys on a node's path are its parent's keys, decayed once more. That takes n *
    depth * key_dim products, and no exponentials but the gates'.
    """
    depths = np.zeros(len(parents), np.int32)
    for node in range(1, len(parents)):
        depths[node] = depths[parents[node]] + 1
    gates, out, written = log_g.exp(), torch.empty_like(v), torch.empty_like(v)
    keys = k.new_zeros(*k.shape[:2], 1, 0, k.shape[-1])  # (1, heads, nodes, depth, key_dim)
    values = v.new_zeros(*v.shape[:2], 1, 0, v.shape[-1])
    total = torch.ones_like(k[:, :, :1])  # decay from the state
    rows = {-1: 0}  # the rows of the nodes of the depth above
    for depth in range(int(depths.max()) + 1):
        nodes = np.flatnonzero(depths == depth).tolist()
        above = torch.tensor([rows[int(parents[i])] for i in nodes], device=k.device)
        index = torch.tensor(nodes, device=k.device)
        gate, key, query = gates[:, :, index], k[:, :, index], q[:, :, index]
        total = total[:, :, above] * gate
        keys, values = keys[:, :, above] * gate[..., None, :], values[:, :, above]
        known = (total * key) @ state + ((keys @ key[..., None]) * values).sum(-2)
        u = beta[:, :, index] * (v[:, :, index] - known)
        keys = torch.cat([keys, key[..., None, :]], -2)
        values = torch.cat([values, u[..., None, :]], -2)
        out[:, :, index] = (total * query) @ state + ((keys @ query[..., None]) * values).sum(-2)
        written[:, :, index] = u
        rows = {node: row for row, node in enumerate(nodes)}
    return out, written
