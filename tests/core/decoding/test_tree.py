"""Positions and ancestors of a draft tree, and the trees of its first nodes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_tables import BUDGETS, KINDS, ROOT, random_table

from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, build_chain, build_tree


def test_is_chain_tells_chains_from_trees():
    table = random_table("flat", (3, 1, 2), 0)
    assert build_tree(table, ROOT, 2).is_chain
    assert not build_tree(table, ROOT, 3).is_chain


def test_positions_follow_depths():
    tree = build_tree(random_table("smooth", (5, 2, 3), 0), ROOT, 16)
    positions = tree.positions(100)
    assert positions.dtype == np.int32
    assert positions.tolist() == [100 + depth for depth in tree.depths.tolist()]


def naive_ancestor_mask(parents: list[int]) -> np.ndarray:
    mask = np.zeros((len(parents), len(parents)), np.bool_)
    for node in range(len(parents)):
        at = node
        while at != -1:
            mask[node, at] = True
            at = parents[at]
    return mask


@pytest.mark.parametrize("kind", KINDS)
def test_ancestor_mask_of_built_trees(kind):
    table = random_table(kind, (15, 16, 16), 4)
    for budget in BUDGETS:
        tree = build_tree(table, ROOT, budget)
        mask = tree.ancestor_mask()
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, naive_ancestor_mask(tree.parents.tolist()))


def test_ancestor_mask_of_any_parents_first_order():
    """Trees from elsewhere need not be sorted by probability or depth."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 40):
        parents = np.array([-1] + [int(rng.integers(0, i)) for i in range(1, n)], np.int32)
        tree = DraftTree.from_parents(np.arange(n, dtype=np.int32), parents)
        np.testing.assert_array_equal(tree.ancestor_mask(), naive_ancestor_mask(parents.tolist()))


def assert_valid(tree: DraftTree) -> None:
    """Parents before children, depths and probabilities that follow from the parents."""
    assert tree.parents[0] == -1
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        assert 0 <= parent < node
        assert tree.depths[node] == tree.depths[parent] + 1
        assert tree.log_probs[node] <= tree.log_probs[parent]


def test_a_child_more_probable_than_certain_by_rounding():
    """A log_softmax over a shortlist gave 1.19e-7: the child was sorted before its parent."""
    log_probs = np.array([[-0.5, -1.0], [1.19e-7, -20.0], [1.19e-7, -20.0]], np.float32)
    tokens = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
    table = TransitionTable.from_marginals(tokens, log_probs)
    tree = build_tree(table, ROOT, 5)
    assert tree.tokens.tolist() == [ROOT, 1, 3, 5, 2]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 0]
    assert tree.depths.tolist() == [0, 1, 2, 3, 1]
    for nodes in range(1, 6):
        cut = tree.subset(np.arange(nodes))
        assert_valid(cut)
        assert cut.ancestor_mask().sum() == (cut.depths + 1).sum()
    assert_valid(build_chain(table, ROOT, 4))


@given(st.data())
def test_trees_are_valid_whatever_the_rounding(data):
    """Every cut of a tree of nearly certain children is a tree, with one child or several."""
    shape = depths, rows, children = data.draw(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
    )
    steps = [2.4e-7, 1.19e-7, 0.0, -1.19e-7, -0.5, -3.0, -np.inf]
    size = depths * rows * children
    log_probs = data.draw(st.lists(st.sampled_from(steps), min_size=size, max_size=size))
    next_row = data.draw(st.lists(st.integers(-1, rows - 1), min_size=size, max_size=size))
    table = TransitionTable(
        np.tile(np.arange(children, dtype=np.int32), (depths, rows, 1)),
        -np.sort(-np.array(log_probs, np.float32).reshape(shape)),
        np.array(next_row, np.int32).reshape(shape),
    ).truncate(depths)
    tree = build_tree(table, ROOT, data.draw(st.integers(1, 20)))
    for nodes in range(1, len(tree) + 1):
        cut = tree.subset(np.arange(nodes))
        assert_valid(cut)
        cut.ancestor_mask()
