"""Draft trees against a plain best-first heap, node for node."""

from __future__ import annotations

from dataclasses import replace
from heapq import heappop, heappush
from itertools import product

import numpy as np
import pytest
from random_tables import BUDGETS, KINDS, ROOT, SHAPES, random_table

from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, build_chain, build_tree


def heap_tree(table: TransitionTable, root: int, budget: int) -> DraftTree:
    """Best-first expansion as OPT-Tree states it, one node at a time."""
    nodes = [(root, -1, 0, 0.0)]
    heap: list[tuple[float, tuple[int, ...], int, int]] = []

    def push_children(node: int, row: int, path: tuple[int, ...], log_prob: float) -> None:
        if len(path) == table.depths or row < 0:
            return
        for rank, step in enumerate(table.log_probs[len(path), row].tolist()):
            if step > -np.inf:
                heappush(heap, (-(log_prob + step), (*path, rank), node, row))

    push_children(0, 0, (), 0.0)
    while heap and len(nodes) < budget:
        cost, path, parent, row = heappop(heap)
        at = len(path) - 1, row, path[-1]
        nodes.append((int(table.tokens[at]), parent, len(path), -cost))
        push_children(len(nodes) - 1, int(table.next_row[at]), path, -cost)
    tokens, parents, depths, log_probs = zip(*nodes, strict=True)
    return DraftTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.array(depths, np.int32),
        np.array(log_probs, np.float64),
    )


def assert_same_tree(actual: DraftTree, expected: DraftTree) -> None:
    for field in ("tokens", "parents", "depths", "log_probs"):
        ours, theirs = getattr(actual, field), getattr(expected, field)
        assert ours.dtype == theirs.dtype, field
        np.testing.assert_array_equal(ours, theirs, err_msg=field)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tree_equals_heap(kind, shape):
    for seed in range(2 if shape == SHAPES[-1] else 6):
        table = random_table(kind, shape, seed)
        for budget in BUDGETS:
            assert_same_tree(build_tree(table, ROOT, budget), heap_tree(table, ROOT, budget))


@pytest.mark.parametrize("kind", KINDS)
def test_tree_holds_the_most_probable_of_all_paths(kind):
    """Against a full enumeration, which takes nothing about best-first search for granted."""
    shape = depths, _, children = 4, 2, 3
    for seed in range(5):
        table = random_table(kind, shape, seed)
        every = []
        for length in range(1, depths + 1):
            for path in product(range(children), repeat=length):
                row, log_prob = 0, 0.0
                for depth, rank in enumerate(path):
                    log_prob += float(table.log_probs[depth, row, rank]) if row >= 0 else -np.inf
                    row = int(table.next_row[depth, row, rank])
                if log_prob > -np.inf:
                    every.append((-log_prob, path))
        every.sort()
        for budget in (2, 5, 20, 500):
            tree = build_tree(table, ROOT, budget)
            assert (-tree.log_probs[1:]).tolist() == [cost for cost, _ in every[: budget - 1]]
            assert tree.depths[1:].tolist() == [len(path) for _, path in every[: budget - 1]]


def test_nodes_stand_in_the_documented_order():
    tree = build_tree(random_table("ties", (7, 5, 4), 0), ROOT, 64)
    assert len(tree) == 64
    assert (tree.tokens[0], tree.parents[0], tree.depths[0], tree.log_probs[0]) == (ROOT, -1, 0, 0)
    assert (tree.parents[1:] < np.arange(1, 64)).all()
    assert (tree.depths[1:] == tree.depths[tree.parents[1:]] + 1).all()
    assert (np.diff(tree.log_probs) <= 0).all()


def test_smaller_trees_open_larger_ones():
    table = random_table("ties", (7, 5, 4), 1)
    large = build_tree(table, ROOT, 256)
    for budget in range(1, 64):
        small = build_tree(table, ROOT, budget)
        assert small.tokens.tolist() == large.tokens[:budget].tolist()
        assert small.parents.tolist() == large.parents[:budget].tolist()


def test_nodes_have_the_confidence_of_the_row_that_they_are_of():
    table = random_table("smooth", (4, 3, 3), 7)
    known = np.random.default_rng(8).random((4, 3)).astype(np.float32)
    table = replace(table, confidences=known)
    tree = build_tree(table, 0, 20)
    assert tree.confidences is not None
    assert tree.confidences[0] == 1
    rows = {0: 0}
    for node in range(1, len(tree)):
        depth, row = tree.depths[node] - 1, rows[int(tree.parents[node])]
        assert tree.confidences[node] == known[depth, row]
        (rank,) = np.flatnonzero(table.tokens[depth, row] == tree.tokens[node])[:1]
        rows[node] = int(table.next_row[depth, row, rank])
    part = tree.subset(np.arange(5))
    assert part.confidences is not None
    assert part.confidences.tolist() == tree.confidences[:5].tolist()
    chain = build_chain(table, 0, 3)
    assert chain.confidences is not None
    assert chain.confidences[:2].tolist() == [1, known[0, 0]]


def test_a_chain_ends_where_no_child_exists():
    """A row may have none, if its token was scored with too few others."""
    table = random_table("smooth", (4, 1, 3), 9)
    table.log_probs[2] = -np.inf
    chain = build_chain(table, ROOT, 9)
    assert chain.tokens.tolist() == [ROOT, *table.tokens[:2, 0, 0]]
    assert np.isfinite(chain.log_probs).all()


def test_equal_probabilities_go_by_rank_path():
    """Two depths, two children, all paths of a depth equal: (0), (1), (0, 0), (0, 1), ..."""
    table = TransitionTable(
        np.array([[[10, 11]], [[20, 21]]], np.int32),
        np.full((2, 1, 2), -1, np.float32),
        np.array([[[0, 0]], [[-1, -1]]], np.int32),
    )
    tree = build_tree(table, ROOT, 99)
    assert tree.tokens.tolist() == [ROOT, 10, 11, 20, 21, 20, 21]
    assert tree.parents.tolist() == [-1, 0, 0, 1, 1, 2, 2]
    assert tree.log_probs.tolist() == [0, -1, -1, -2, -2, -2, -2]


def test_a_certain_child_comes_right_after_its_parent():
    table = TransitionTable(
        np.array([[[10, 11]], [[20, 21]]], np.int32),
        np.array([[[-1, -1]], [[0, -9]]], np.float32),
        np.array([[[0, 0]], [[-1, -1]]], np.int32),
    )
    assert build_tree(table, ROOT, 5).tokens.tolist() == [ROOT, 10, 20, 11, 20]


def test_budget_larger_than_the_table_takes_all_of_it():
    table = random_table("smooth", (2, 1, 3), 0)
    assert len(build_tree(table, ROOT, 10**6)) == 1 + 3 + 9


def test_absent_children_everywhere_leave_the_root():
    table = TransitionTable(
        np.zeros((3, 1, 4), np.int32),
        np.full((3, 1, 4), -np.inf, np.float32),
        np.zeros((3, 1, 4), np.int32),
    )
    assert_same_tree(build_tree(table, ROOT, 16), DraftTree.root_only(ROOT))


def test_absent_children_cost_nothing():
    """One possible path in a table with 16 ** 15 impossible ones."""
    log_probs = np.full((15, 1, 16), -np.inf, np.float32)
    log_probs[..., 0] = -1
    next_row = np.zeros((15, 1, 16), np.int32)
    next_row[-1] = -1
    table = TransitionTable(np.tile(np.arange(16, dtype=np.int32), (15, 1, 1)), log_probs, next_row)
    tree = build_tree(table, ROOT, 1024)
    assert tree.is_chain
    assert tree.log_probs.tolist() == [-float(d) for d in range(16)]


def test_root_only():
    tree = DraftTree.root_only(ROOT)
    assert (tree.tokens.tolist(), tree.parents.tolist(), tree.depths.tolist()) == (
        [ROOT],
        [-1],
        [0],
    )
    assert tree.is_chain
    assert_same_tree(build_tree(random_table("smooth", (5, 2, 3), 0), ROOT, 1), tree)
    assert_same_tree(build_chain(random_table("smooth", (5, 2, 3), 0), ROOT, 1), tree)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
def test_chain_is_the_best_child_after_each_token(shape, budget):
    table = random_table("dead-ends", shape, 3)
    chain = build_chain(table, ROOT, budget)
    tokens, log_probs, total, row = [ROOT], [0.0], 0.0, 0
    for depth in range(min(budget, shape[0] + 1) - 1):
        if row < 0 or table.log_probs[depth, row, 0] == -np.inf:
            break
        total += float(table.log_probs[depth, row, 0])
        tokens.append(int(table.tokens[depth, row, 0]))
        row = int(table.next_row[depth, row, 0])
        log_probs.append(total)
    assert_same_tree(
        chain,
        DraftTree(
            np.array(tokens, np.int32),
            np.arange(-1, len(tokens) - 1, dtype=np.int32),
            np.arange(len(tokens), dtype=np.int32),
            np.array(log_probs),
        ),
    )
    assert chain.is_chain


def paths_of(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """Return the log probability of each path of tokens."""
    paths: list[tuple[int, ...]] = []
    for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return dict(zip(paths, tree.log_probs.tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_a_tree_is_built_again_from_its_table(kind, shape):
    for budget in (1, 2, 3, 16):
        tree = build_tree(random_table(kind, shape, 0), ROOT, budget)
        for spare in (0, 9):
            again = build_tree(tree.as_table(), ROOT, len(tree) + spare)
            assert paths_of(again) == pytest.approx(paths_of(tree), abs=1e-5)


def test_the_table_of_a_tree_keeps_its_paths_apart_and_sorts_children():
    """Token 5 stands at depth 2 twice, with other children, and the worse child is first."""
    tree = DraftTree(
        np.array([ROOT, 1, 2, 5, 5, 8, 9], np.int32),
        np.array([-1, 0, 0, 1, 2, 3, 4], np.int32),
        np.array([0, 1, 1, 2, 2, 3, 3], np.int32),
        np.log([1, 0.2, 0.7, 0.1, 0.6, 0.05, 0.3]),
    )
    table = tree.as_table()
    assert table.tokens[0, 0].tolist() == [2, 1]
    assert np.exp(table.log_probs[:, 0, 0]) == pytest.approx([0.7, 0.5, 0.5])
    again = build_tree(table, ROOT, 7)
    assert paths_of(again) == pytest.approx(paths_of(tree))
    assert again.tokens.tolist() == [ROOT, 2, 5, 9, 1, 5, 8]


def test_a_tree_of_equally_probable_paths_has_a_table():
    tree = DraftTree.from_parents(
        np.array([ROOT, 1, 2, 3], np.int32), np.array([-1, 0, 0, 1], np.int32)
    )
    assert paths_of(build_tree(tree.as_table(), ROOT, 4)) == paths_of(tree)
