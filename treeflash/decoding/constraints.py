"""Allowed tokens by path (structured output): masks per node, and trees without forbidden nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.choices import unpack
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree


class Constraint(Protocol):
    """What may follow the tokens generated so far: a grammar matcher, for example."""

    def allowed(self) -> NDArray[np.uint32]:
        """(ceil(vocab / 32),) bitmask of the tokens that may come next; see `Choice.allowed`."""

    def advance(self, token: int) -> None:
        """Append a token that is allowed."""

    def rollback(self, tokens: int) -> None:
        """Take the last tokens back."""


def prune(table: TransitionTable, allowed: NDArray[np.uint32], vocab_size: int) -> TransitionTable:
    """The table without first tokens that are not allowed, so that no budget is spent on them."""
    log_probs = table.log_probs.copy()
    permitted = unpack(allowed[None], vocab_size)[0][table.tokens[0, 0]]
    log_probs[0, 0, ~permitted] = -np.inf
    order = np.argsort(-log_probs[0, 0], kind="stable")
    tokens, next_row = table.tokens.copy(), table.next_row.copy()
    for array in (tokens, log_probs, next_row):
        array[0, 0] = array[0, 0, order]
    return replace(table, tokens=tokens, log_probs=log_probs, next_row=next_row)


def constrain(tree: DraftTree, constraint: Constraint) -> tuple[DraftTree, NDArray[np.uint32]]:
    """The tree without forbidden nodes and what is below them, and the mask of each node left.

    The nodes are visited depth first, so that the constraint advances and rolls back one token at a
    time; afterwards it is where it was.

    Args:
        tree: the constraint has advanced over its root.
        constraint: of the text.

    Returns:
        The tree of n nodes, and (n, ceil(vocab / 32)) bitmasks.
    """
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents.tolist()):
        children.setdefault(parent, []).append(node)
    masks: dict[int, NDArray[np.uint32]] = {}

    def visit(node: int) -> None:
        mask = masks[node] = constraint.allowed()
        for child in children.get(node, ()):
            token = int(tree.tokens[child])
            if mask[token // 32] >> np.uint32(token % 32) & 1:
                constraint.advance(token)
                visit(child)
                constraint.rollback(1)

    visit(0)
    kept = np.array(sorted(masks), np.int64)
    return tree.subset(kept), np.stack([masks[node] for node in kept.tolist()])
