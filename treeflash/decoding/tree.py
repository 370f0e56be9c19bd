"""Draft trees, and the path of a tree that the target accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.transitions import TransitionTable


@dataclass(frozen=True, eq=False)
class DraftTree:
    """A tree of proposed tokens under the root, parents before children.

    Attributes:
        tokens: (n,) int32; tokens[0] is the root, the newest committed token.
        parents: (n,) int32; parents[0] == -1 and parents[i] < i.
        depths: (n,) int32; distance from the root, whose depth is 0.
        log_probs: (n,) float64; the drafter's log probability of the path to each node, nats; in
            decoding, calibrated.
        confidences: (n,) float32; of the row of the table that each node is a child of, 1 for the
            root; None if the drafter states none.
        matches: (n,) int32; for nodes that continue an earlier occurrence of the text, the tokens
            before the node that agree with it; for nodes that a constraint suggests, how often it
            was in this state. 0 for the drafter's; None if all are the drafter's.
    """

    tokens: NDArray[np.int32]
    parents: NDArray[np.int32]
    depths: NDArray[np.int32]
    log_probs: NDArray[np.float64]
    confidences: NDArray[np.float32] | None = None
    matches: NDArray[np.int32] | None = None

    @classmethod
    def root_only(cls, root: int) -> DraftTree:
        """Return the tree of plain decoding: the root alone."""
        zero = np.zeros(1, np.int32)
        return cls(np.array([root], np.int32), zero - 1, zero, np.zeros(1))

    @classmethod
    def chain(
        cls,
        tokens: NDArray[np.int32],
        log_probs: NDArray[np.float64] | None = None,
        confidences: NDArray[np.float32] | None = None,
    ) -> DraftTree:
        """Build the tree in which each of (n,) tokens follows the one before it.

        `log_probs` are (n,) of the paths, nats; None for tokens that are certain.
        """
        order = np.arange(len(tokens), dtype=np.int32)
        if log_probs is None:
            log_probs = np.zeros(len(tokens))
        return cls(tokens, order - 1, order, log_probs, confidences)

    @classmethod
    def from_parents(cls, tokens: NDArray[np.int32], parents: NDArray[np.int32]) -> DraftTree:
        """Build the tree of (n,) tokens and their parents, with equally probable paths."""
        depths = np.zeros(len(parents), np.int32)
        for node in range(1, len(parents)):
            depths[node] = depths[parents[node]] + 1
        return cls(tokens, parents, depths, np.zeros(len(parents)))

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"DraftTree(nodes={len(self)}, depth={int(self.depths.max())})"

    def subset(self, nodes: NDArray[np.int64]) -> DraftTree:
        """Return the tree of some nodes in ascending order, with the parent of each among them."""
        number = np.full(len(self) + 1, -1, np.int32)  # the root's parent is -1, the last entry
        number[nodes] = np.arange(len(nodes))
        return DraftTree(
            self.tokens[nodes],
            number[self.parents[nodes]],
            self.depths[nodes],
            self.log_probs[nodes],
            None if self.confidences is None else self.confidences[nodes],
            None if self.matches is None else self.matches[nodes],
        )

    def as_table(self) -> TransitionTable:
        """Return the table whose paths are the nodes of this tree, so that a head can choose them.

        Each node is a row. A tree of at least as many nodes that is built from the table has the
        same nodes, ordered by their log probabilities.
        """
        children: list[list[int]] = [[] for _ in self.tokens]
        for node in np.argsort(-self.log_probs[1:], kind="stable") + 1:
            children[self.parents[node]].append(int(node))
        inner = [node for node, below in enumerate(children) if below or not node]
        levels = [
            [node for node in inner if self.depths[node] == depth]
            for depth in range(max(1, int(self.depths.max())))
        ]
        shape = len(levels), max(map(len, levels)), max(1, *map(len, children))
        row_of = {node: row for level in levels for row, node in enumerate(level)}
        tokens, next_row = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        log_probs = np.full(shape, -np.inf, np.float32)
        for node in inner:
            below = children[node]
            place = int(self.depths[node]), row_of[node], slice(len(below))
            tokens[place] = self.tokens[below]
            log_probs[place] = self.log_probs[below] - self.log_probs[node]
            next_row[place] = [row_of.get(child, -1) for child in below]
        return TransitionTable(tokens, log_probs, next_row)

    @property
    def is_chain(self) -> bool:
        """Whether no node has two children."""
        return bool(self.depths[-1] == len(self) - 1)

    def positions(self, start: int) -> NDArray[np.int32]:
        """Return the (n,) int32 absolute positions; `start` is the root's."""
        return self.depths + np.int32(start)

    def ancestor_mask(self) -> NDArray[np.bool_]:
        """Return (n, n) bool: [i, j] tells whether node i attends to j, an ancestor or itself."""
        if self.is_chain:
            return np.tri(len(self), dtype=np.bool_)
        mask = np.eye(len(self), dtype=np.bool_)
        for depth in range(1, int(self.depths.max()) + 1):
            nodes = np.flatnonzero(self.depths == depth)
            mask[nodes] |= mask[self.parents[nodes]]
        return mask


def build_chain(table: TransitionTable, root: int, budget: int) -> DraftTree:
    """Build the chain of the best child after each token, at most `budget` nodes.

    It follows `next_row` from the root, and ends at a child without a next row.
    """
    tokens, steps, rows, row = [root], [0.0], [], 0
    for depth in range(min(budget - 1, table.depths)):
        step = float(table.log_probs[depth, row, 0])
        if step == -np.inf:
            break
        tokens.append(int(table.tokens[depth, row, 0]))
        steps.append(step)
        rows.append(row)
        row = int(table.next_row[depth, row, 0])
        if row < 0:
            break
    confidences = None
    if table.confidences is not None:
        confidences = np.ones(len(tokens), np.float32)
        confidences[1:] = table.confidences[np.arange(len(rows)), rows]
    return DraftTree.chain(np.array(tokens, np.int32), np.cumsum(steps), confidences)


@dataclass(frozen=True, eq=False)
class FlatTable:
    """A table as a list of rows, the root's first.

    Attributes:
        tokens: (n, K) int32 children of the rows.
        log_probs: (n, K) float32 of the children; -inf marks an absent child.
        following: gives the rows that follow some children, whose (c,) rows and ranks it is given;
            n or a larger number if there is none.
        confidences: (n,) float32 of the rows; None if the drafter states none.
    """

    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    following: Callable[[NDArray[np.integer], NDArray[np.int64]], NDArray[np.integer]]
    confidences: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, table: TransitionTable) -> FlatTable:
        """Return the D * M rows of a table, depth by depth."""
        depths, rows, children = table.tokens.shape
        flat = depths * rows
        next_row = table.next_row.reshape(flat, children)

        def following(row: NDArray[np.integer], rank: NDArray[np.int64]) -> NDArray[np.integer]:
            place, depth = next_row[row, rank], row // rows + 1
            is_none = (place < 0) | (depth == depths)
            found: NDArray[np.integer] = np.where(is_none, flat, depth * rows + place)
            return found

        return cls(
            table.tokens.reshape(flat, children),
            table.log_probs.reshape(flat, children),
            following,
            None if table.confidences is None else table.confidences.reshape(flat),
        )


def build_tree(table: TransitionTable, root: int, budget: int) -> DraftTree:
    """Build the `budget - 1` most probable paths of the table, under the root, best first.

    The result equals best-first expansion with a heap (OPT-Tree, section 3.2), as a child is never
    more probable than its parent or than an earlier sibling. It is built level by level instead,
    and a level keeps only candidates that may still be among the best. Paths of equal probability
    are ordered by their ranks among siblings, the lexicographically smaller first. The table may
    allow fewer nodes than the budget.
    """
    return grow_tree(FlatTable.of(table), root, budget)


def grow_tree(table: FlatTable, root: int, budget: int) -> DraftTree:
    """Return `build_tree` of a table as a list of rows."""
    room = budget - 1
    levels = _levels(table, room) if room else []
    if not levels:
        return DraftTree.root_only(root)
    log_probs, above, rows, ranks = (np.concatenate(parts) for parts in zip(*levels, strict=True))
    order = _best_first(log_probs, above, ranks)[:room]
    # Node numbers of the tree, by number among all kept candidates; -1 stands for the root.
    number = np.zeros(len(log_probs) + 1, np.int32)
    number[order] = np.arange(1, len(order) + 1)
    size = len(order) + 1
    tokens, parents, depths = (np.empty(size, np.int32) for _ in range(3))
    path_log_probs = np.empty(size)
    tokens[0], parents[0], depths[0], path_log_probs[0] = root, -1, 0, 0.0
    rows = rows[order]
    tokens[1:] = table.tokens[rows, ranks[order]]
    parents[1:] = number[above[order]]
    depths[1:] = np.arange(1, len(levels) + 1).repeat([len(level[0]) for level in levels])[order]
    path_log_probs[1:] = log_probs[order]
    confidences = None
    if table.confidences is not None:
        confidences = np.ones(size, np.float32)
        confidences[1:] = table.confidences[rows]
    return DraftTree(tokens, parents, depths, path_log_probs, confidences)


_Level: TypeAlias = tuple[
    NDArray[np.float64], NDArray[np.int64], NDArray[np.integer], NDArray[np.int64]
]
"""The (c,) log probabilities, parents, rows and ranks of the candidates of one depth, in
lexicographic order of their rank paths. Parents are numbers among the candidates of all levels so
far; -1 is the root. Rows are rows of the table, whose children the candidates are."""


def _levels(table: FlatTable, room: int) -> list[_Level]:
    """Return candidates depth by depth, all of the `room` best paths among them."""
    levels: list[_Level] = []
    width = table.tokens.shape[1]
    best = np.empty(0)  # the log probabilities of the best paths so far, `room` at most
    floor = np.finfo(np.float64).min  # a path below it is not among the best; -inf never is
    rows: NDArray[np.integer] = np.zeros(1, np.int64)
    parents = np.full(1, -1, np.int64)
    log_probs = np.zeros(1)
    first = 0
    while len(rows):
        paths = (log_probs[:, None] + table.log_probs[rows]).ravel()
        kept = (paths >= floor).nonzero()[0]
        if not len(kept):
            break
        paths = paths[kept]
        best = np.concatenate([best, paths])
        if len(best) > room:
            best.partition(len(best) - room)
            best = best[len(best) - room :]
            floor = best[0]
            inside = (paths >= floor).nonzero()[0]
            kept, paths = kept[inside], paths[inside]
        node, rank = np.divmod(kept, width)
        row = rows[node]
        levels.append((paths, parents[node], row, rank))
        following = table.following(row, rank)
        inner = (following < len(table.tokens)).nonzero()[0]
        rows, log_probs, parents = following[inner], paths[inner], first + inner
        first += len(kept)
    return levels


def _best_first(
    log_probs: NDArray[np.float64], parents: NDArray[np.int64], ranks: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Sort candidates, the most probable first; ties by rank path."""
    order = np.argsort(-log_probs, kind="stable")
    ranked = log_probs[order]
    if not (ranked[1:] == ranked[:-1]).any():
        return order
    # This is rare: rank paths are made only where probabilities are equal.
    paths: dict[int, tuple[int, ...]] = {-1: ()}

    def path(node: int) -> tuple[int, ...]:
        if node not in paths:
            paths[node] = (*path(int(parents[node])), int(ranks[node]))
        return paths[node]

    return np.array(sorted(order.tolist(), key=lambda node: (-log_probs[node], path(node))))


@dataclass(frozen=True, eq=False)
class Acceptance:
    """The outcome of verifying one tree."""

    # (a,) int32 node indices from the root down; path[0] == 0, each the parent of the next
    path: NDArray[np.int32]
    # the a emitted tokens: the tokens of path[1:], then the bonus token, which the target sampled
    # at the last node of the path and which is the next root
    tokens: tuple[int, ...]


def accept(tree: DraftTree, sampled: NDArray[np.int32]) -> Acceptance:
    """Follow the target's (n,) int32 tokens through the tree (TreeFlash, section 3; SpecInfer).

    The target sampled each token after its true prefix, and the tree was fixed before. So the
    accepted tokens have exactly the distribution of plain decoding, at every temperature.
    """
    children = {
        (parent, token): node
        for node, (parent, token) in enumerate(
            zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)
        )
    }
    tokens = sampled.tolist()
    path = [0]
    while (child := children.get((path[-1], tokens[path[-1]]))) is not None:
        path.append(child)
    return Acceptance(np.array(path, np.int32), tuple(tokens[node] for node in path))
