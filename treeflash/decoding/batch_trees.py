"""Tables, calibration and trees of all sequences of a draft, in calls over all of them at once.

The problem: a draft of 32 sequences has 32 tables of some 200 rows with 16 children each. To make a
table, calibrate it and grow its tree takes about a hundred calls of NumPy, and each call costs more
than what it computes, while the device waits.

The idea: most rows are never looked at, because a tree of 16 nodes opens 16 of them. So the rows
that a head scored stay in one array for all sequences (`TableBatch`), a row is calibrated when a
tree opens it, and the trees grow in lockstep: each step adds a node to every tree.

Example: two trees of three nodes. At first each has opened its root's row, whose child 0 is its
best candidate. A step makes the best candidate of each tree its next node. Two candidates take its
place: the node's next sibling, and child 0 of the row that follows the node. So a tree of n nodes
has at most n candidates, and the best of them is next in the best-first order.

The rule: `draft_trees` gives what `Calibration.correct` and `build_tree` give, bit for bit.
Candidates of equal probability are rare, and their trees are left to `build_tree`, which knows
their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.transitions import (
    BatchTable,
    Calibration,
    TableBatch,
    TransitionTable,
    calibrate,
    powers,
)
from treeflash.decoding.tree import DraftTree, FlatTable, build_tree, grow_tree

STEPS_PER_TREE = 3
"""Steps of all trees that take as long as to grow one tree by `build_tree`."""


def draft_trees(
    tables: Sequence[TransitionTable],
    calibrations: Sequence[Calibration],
    roots: Sequence[int],
    nodes: Sequence[int],
    *,
    steps_per_tree: int = STEPS_PER_TREE,
) -> list[tuple[TransitionTable, DraftTree]]:
    """Return the calibrated table of each sequence, and the tree that `build_tree` grows from it.

    `nodes` are the budgets, the roots included. Trees of at least `steps_per_tree` nodes for each
    sequence are grown one by one, others together.
    """
    drafts: dict[int, tuple[TransitionTable, DraftTree]] = {}
    for batch, members in _by_batch(tables).items():
        if batch is None:
            for i in members:
                corrected = calibrations[i].correct(tables[i])
                drafts[i] = corrected, build_tree(corrected, roots[i], nodes[i])
            continue
        exponents = np.array([calibrations[i].exponent for i in members])
        vocab_size = calibrations[next(iter(members))].vocab_size
        budgets = [nodes[i] for i in members]
        trees: list[DraftTree | None] = [None] * len(members)
        if max(budgets) < steps_per_tree * len(members):
            first = [roots[i] for i in members]
            indices = list(members.values())
            trees = _grow(batch, indices, exponents, vocab_size, first, budgets)
        for (i, index), exponent, tree in zip(members.items(), exponents, trees, strict=True):
            if tree is None:
                flat = _flat(batch, index, float(exponent), vocab_size)
                tree = grow_tree(flat, roots[i], nodes[i])
            drafts[i] = calibrations[i].deferred(tables[i], float(exponent)), tree
    return [drafts[i] for i in range(len(tables))]


@dataclass(frozen=True, eq=False)
class Outcome:
    """A table as it was drafted, and the target's tokens after its root."""

    calibration: Calibration
    table: TransitionTable
    tokens: Sequence[int]


def observe(outcomes: Sequence[Outcome]) -> None:
    """Let each calibration learn, as `Calibration.observe` does."""
    for batch, members in _by_batch([x.table for x in outcomes]).items():
        if batch is None:
            for i in members:
                outcomes[i].calibration.observe(outcomes[i].table, outcomes[i].tokens)
        else:
            _observe(batch, [*members.values()], [outcomes[i] for i in members])


def _observe(batch: TableBatch, indices: Sequence[int], outcomes: Sequence[Outcome]) -> None:
    passed = [
        (lane, row, rank)
        for lane, (index, outcome) in enumerate(zip(indices, outcomes, strict=True))
        for row, rank in batch.path(index, outcome.tokens)
    ]
    lanes, rows, ranks = zip(*passed, strict=True)
    vocab_size = outcomes[0].calibration.vocab_size
    log_probs = batch.log_probs[np.array(rows)]
    scores, totals = powers(log_probs, np.array(ranks), vocab_size)
    for lane, score, total in zip(lanes, scores, totals, strict=True):
        outcomes[lane].calibration.add(score, total)


def _by_batch(tables: Sequence[TransitionTable]) -> dict[TableBatch | None, dict[int, int]]:
    """Return the tables of each batch by number, each with its index in the batch.

    None is for tables of no batch.
    """
    members: dict[TableBatch | None, dict[int, int]] = {}
    for i, table in enumerate(tables):
        batch, index = (table.batch, table.index) if isinstance(table, BatchTable) else (None, i)
        members.setdefault(batch, {})[i] = index
    return members


def _flat(batch: TableBatch, i: int, exponent: float, vocab_size: int) -> FlatTable:
    """Return the calibrated table of a sequence of a batch."""
    first = int(batch.first_row[i])
    part = slice(first, first + batch.rows)

    def following(rows: NDArray[np.integer], ranks: NDArray[np.int64]) -> NDArray[np.integer]:
        return batch.following(rows + first, ranks) - first

    return FlatTable(
        batch.tokens[part],
        calibrate(batch.log_probs[part], exponent, vocab_size),
        following,
        None if batch.confidences is None else batch.confidences[part],
    )


def _grow(
    batch: TableBatch,
    indices: Sequence[int],
    exponents: NDArray[np.float64],
    vocab_size: int,
    roots: Sequence[int],
    nodes: Sequence[int],
) -> list[DraftTree | None]:
    """Grow the trees of some sequences in lockstep; None for one with equal candidates.

    Args:
        batch: the sequences' rows.
        indices: (B,) of the sequences in the batch.
        exponents: (B,) of the sequences' probabilities.
        vocab_size: of the target.
        roots: (B,) tokens.
        nodes: (B,) budgets.
    """
    count, width, size = len(indices), batch.tokens.shape[1], max(nodes)
    lanes, starts = np.arange(count), batch.first_row[indices]
    # The arrays are by lane and node. A node opens the row that has the node's number.
    row = np.full((count, size), -1, np.int64)  # the row whose child the node is
    rank = np.zeros((count, size), np.int64)  # the rank of the node among the row's children
    parent = np.full((count, size), -1, np.int64)
    depth = np.zeros((count, size), np.int64)
    value = np.zeros((count, size))  # log probability of the path
    opened = np.zeros((count, size), np.int64)  # the opened row
    # Log probabilities of the paths to the children of opened rows; none follows the last child.
    paths = np.full((count, size, width + 1), -np.inf)
    following = np.zeros((count, size), np.int64)  # the first child that is no node yet
    best = np.full((count, size), -np.inf)  # the log probability of the path to it

    opened[:, 0] = starts
    paths[:, 0, :width] = 0.0 + calibrate(batch.log_probs[starts], exponents, vocab_size)
    best[:, 0] = paths[:, 0, 0]
    flat_paths = paths.reshape(count * size, width + 1)
    for node in range(1, size):
        above = best.argmax(1)
        place = above + lanes * size
        value[:, node] = known = best.ravel()[place]
        child = following.ravel()[place]
        mother = opened.ravel()[place]
        parent[:, node], row[:, node], rank[:, node] = above, mother, child
        depth[:, node] = depth.ravel()[place] + 1
        sibling = np.minimum(child + 1, width)
        following.ravel()[place] = sibling
        best.ravel()[place] = flat_paths[place, sibling]
        new = batch.following(mother, np.minimum(child, width - 1))
        opened[:, node] = new
        log_probs = calibrate(batch.log_probs[new], exponents, vocab_size)
        paths[:, node, :width] = known[:, None] + log_probs
        best[:, node] = paths[:, node, 0]
    found = value > -np.inf
    equal = ((value[:, 1:] == value[:, :-1]) & found[:, 1:]).any(1)
    equal |= (best.max(1) == value[:, -1]) & found[:, -1]
    sizes = np.minimum(found.sum(1), nodes).tolist()
    tokens = batch.tokens[row, np.minimum(rank, width - 1)]
    tokens[:, 0] = roots
    parents, depths = parent.astype(np.int32), depth.astype(np.int32)
    confidences = None if batch.confidences is None else batch.confidences[row]
    trees: list[DraftTree | None] = []
    for lane, n in enumerate(sizes):
        if equal[lane]:
            trees.append(None)
        elif n == 1:
            trees.append(DraftTree.root_only(roots[lane]))
        else:
            known = None if confidences is None else confidences[lane, :n]
            parts = tokens[lane, :n], parents[lane, :n], depths[lane, :n], value[lane, :n]
            trees.append(DraftTree(*parts, known))
    return trees
