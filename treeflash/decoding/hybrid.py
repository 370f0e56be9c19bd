"""Hybrid targets: the rules of a recurrent layer on a draft tree, for both device backends.

A recurrent layer reads the state after a node's parent. No state of a node is stored: with A the
ancestor mask (`DraftTree.ancestor_mask`), g_i the log decay of node i, S the committed state and
l = A g, the chunked form of the gated delta rule (arXiv 2412.06464, section 3.3) holds on a tree if
the ancestor mask replaces the causal mask:

    D_ij = exp(l_i - l_j) where A_ij, else 0
    u_i  = beta_i (v_i - exp(l_i) S^T k_i - sum_{j proper ancestor} D_ij (k_j . k_i) u_j)
    o_i  = exp(l_i) S^T q_i + sum_j D_ij (q_i . k_j) u_j

Gated linear attention and Mamba-2 (arXiv 2405.21060) have u_i = v_i. A path p_1 .. p_a is
committed by S <- exp(sum g) S + sum_j exp(sum of g after j) k_j u_j^T, with decays that are summed
along the path.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def convolution_windows(parents: NDArray[np.int32], kernel: int) -> NDArray[np.int32]:
    """Return (n, W) int32 inputs of a causal convolution of width `kernel` at a tree's nodes.

    They are row numbers: the rows are the W - 1 last inputs of the committed sequence and then the
    inputs of the n nodes. Each node has its W - 1 nearest ancestors, the nearest last, and itself.
    """
    windows = np.empty((len(parents), kernel), np.int32)
    current = np.arange(len(parents), dtype=np.int32)
    for column in reversed(range(kernel)):
        windows[:, column] = kernel - 1 + current  # a negative number counts back from the root
        current = np.where(current >= 0, parents[np.maximum(current, 0)], current - 1)
    return windows


def convolution_tail(path: NDArray[np.int32], kernel: int) -> NDArray[np.int32]:
    """Return the (W - 1,) int32 last inputs after a path of (a,) nodes, the root first.

    They are row numbers as in `convolution_windows`.
    """
    rows = np.concatenate([np.arange(kernel - 1), kernel - 1 + path])
    return rows[len(path) :].astype(np.int32)


def depth_first(parents: Sequence[int] | NDArray[np.int32]) -> tuple[NDArray[np.int32], int]:
    """Plan the order in which a tree's nodes are visited, and the number of slots that it takes.

    Returns:
        (n, 3) int32 rows: a node; the slot that its parent's state is in, or -1 if the parent is
        the node before it; the slot that its own state is kept in, or -1.
    """
    n = len(parents)
    children: list[list[int]] = [[] for _ in range(n)]
    for node in range(1, n):
        children[parents[node]].append(node)
    slots = [0] * n  # slots that the subtree of each node takes
    for node in reversed(range(n)):
        children[node].sort(key=lambda child: slots[child])
        needs = [slots[child] for child in children[node]]
        slots[node] = max(needs[-1:] + [1 + need for need in needs[:-1]], default=0)
    rows, waiting = [], [(0, -1, 0)]  # a node, the slot of its parent, and the first free slot
    while waiting:
        node, parent_slot, free = waiting.pop()
        slot = free if len(children[node]) > 1 else -1
        rows.append((node, parent_slot, slot))
        if children[node]:
            # The stack turns the order round: the last child, which frees the slot, comes first.
            first, *others = [(child, slot, free + 1) for child in children[node]]
            waiting += [(child, kept, free) for child, kept, _ in others[-1:]]
            waiting += [*reversed(others[:-1]), (first[0], -1, free + (slot >= 0))]
    return np.array(rows, np.int32), slots[0]


def most_kept(n: int) -> int:
    """Return the largest number of slots that `depth_first` takes for a tree of n nodes."""
    return max((n + 1).bit_length() - 2, 0)
