"""Draft trees: how they are built, their masks and cuts, and which path of them is accepted.

Trees under a constraint have what it allows, what it forces, and what followed its states before.
"""

from collections import Counter
from dataclasses import replace
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_tables import BUDGETS, KINDS, ROOT, SHAPES, random_table

from treeflash.decoding.merged_trees import Allowed, Choices, merge, merge_allowed
from treeflash.decoding.sampling import only, unpack
from treeflash.decoding.suffix import SuffixDrafter, SuffixTree
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, accept, build_chain, build_tree
from treeflash.testing.comparisons import paths, random_tree
from treeflash.testing.comparisons import paths as token_paths


def test_is_chain_tells_chains_from_trees():
    table = random_table("flat", (3, 1, 2), 0)
    assert build_tree(table, ROOT, 2).is_chain
    assert not build_tree(table, ROOT, 3).is_chain


def naive_ancestor_mask(parents: list[int]) -> np.ndarray:
    mask = np.zeros((len(parents), len(parents)), np.bool_)
    for node in range(len(parents)):
        at = node
        while at != -1:
            mask[node, at] = True
            at = parents[at]
    return mask


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


def test_nodes_have_the_confidence_of_the_row_that_they_are_of():
    table = random_table("smooth", (4, 3, 3), 7)
    known = np.random.default_rng(8).random((4, 3)).astype(np.float32)
    table = replace(table, confidences=known)
    tree = build_tree(table, 0, 20)
    assert tree.confidences[0] == 1
    rows = {0: 0}
    for node in range(1, len(tree)):
        depth, row = tree.depths[node] - 1, rows[int(tree.parents[node])]
        assert tree.confidences[node] == known[depth, row]
        (rank,) = np.flatnonzero(table.tokens[depth, row] == tree.tokens[node])[:1]
        rows[node] = int(table.next_row[depth, row, rank])
    part = tree.subset(np.arange(5))
    assert part.confidences.tolist() == tree.confidences[:5].tolist()
    chain = build_chain(table, 0, 3)
    assert chain.confidences[:2].tolist() == [1, known[0, 0]]


def test_a_chain_ends_where_no_child_exists():
    """A row may have none, if its token was scored with too few others."""
    table = random_table("smooth", (4, 1, 3), 9)
    table.log_probs[2] = -np.inf
    chain = build_chain(table, ROOT, 9)
    assert chain.tokens.tolist() == [ROOT, *table.tokens[:2, 0, 0]]
    assert np.isfinite(chain.log_probs).all()


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
    return dict(zip(paths(tree), tree.log_probs.tolist(), strict=True))


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


def naive_walk(tree: DraftTree, chosen: np.ndarray) -> tuple[list[int], list[int]]:
    path, tokens = [0], [int(chosen[0])]
    while True:
        for node in range(len(tree)):
            if tree.parents[node] == path[-1] and tree.tokens[node] == tokens[-1]:
                path.append(node)
                tokens.append(int(chosen[node]))
                break
        else:
            return path, tokens


@pytest.mark.parametrize("nodes", [1, 2, 3, 8, 40])
def test_walk_equals_naive_walk(nodes):
    rng = np.random.default_rng(nodes)
    lengths = set()
    for _ in range(300):
        tree = random_tree(rng, 0, nodes, vocab_size=4)
        chosen = rng.integers(0, 4, nodes).astype(np.int32)
        accepted = accept(tree, chosen)
        path, tokens = naive_walk(tree, chosen)
        assert accepted.path.tolist() == path
        assert list(accepted.tokens) == tokens
        assert accepted.path.dtype == np.int32
        lengths.add(len(path))
    assert max(lengths) >= min(nodes, 4)


VOCAB = 400


class Rules:
    """A constraint: `following` gives the tokens that may follow the ones so far."""

    end_tokens = frozenset()

    def __init__(self, following, tokens=()):
        self.following, self.tokens = following, list(tokens)

    def allowed(self):
        tokens = np.array(self.following(self.tokens), np.int32)
        return np.bitwise_or.reduce(only(tokens, VOCAB))

    def advance(self, token):
        assert token in self.following(self.tokens)
        self.tokens.append(token)

    def rollback(self, tokens):
        assert tokens
        del self.tokens[-tokens:]


def anything(tokens):
    return range(VOCAB)


def spell(text):
    """Rules that allow anything after 9, and force a text after everything else."""

    def following(tokens):
        after = tokens[::-1].index(9) if 9 in tokens else len(tokens)
        return [text[after]] if after < len(text) else anything(tokens)

    return following


def draft(following, table=None, proposal=None, *, nodes=16, deepest=99, seen=None, **options):
    constraint = Rules(following, [9])
    known = Choices() if seen is None else seen
    tree, masks = merge_allowed(
        *(table, proposal, 9, nodes, constraint, lambda allowed: known.seen("", allowed)),
        deepest=deepest,
        **options,
    )
    assert constraint.tokens == [9]
    return tree, masks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paths_are_allowed_and_masks_are_theirs(kind, shape):
    table, rng = random_table(kind, shape, 0), np.random.default_rng(0)
    text = rng.integers(0, 3 * shape[2], 60).tolist()
    proposal = SuffixDrafter([*text, *text[10:16]]).propose(20, 20)

    def following(tokens):  # from one token to all of them
        seed = [tokens[-1], len(tokens)]
        return np.flatnonzero(
            np.random.default_rng(seed).random(VOCAB) < seed[0] % 7 / 6
        ).tolist() or [sum(seed) % VOCAB]

    for nodes in (1, 7, 40):
        tree, masks = draft(following, table, proposal, nodes=nodes, deepest=9)
        paths = token_paths(tree)
        assert len(set(paths)) == len(paths) <= nodes
        assert tree.depths.max() <= 9
        for path, mask in zip(paths, unpack(masks, VOCAB), strict=True):
            assert np.flatnonzero(mask).tolist() == sorted(following(path))
            assert all(path[n] in following(path[:n]) for n in range(1, len(path)))
        assert (np.diff(tree.log_probs) <= 1e-9).all()
        assert (tree.parents[1:] < np.arange(1, len(tree))).all()


@pytest.mark.parametrize("kind", ["smooth", "peaked", "holes", "dead-ends"])  # those without ties
def test_a_constraint_that_allows_everything_changes_nothing(kind):
    table = random_table(kind, (5, 2, 3), 3)
    tree, _ = draft(anything, table, nodes=12)
    joined = merge(table, SuffixTree(0), 9, 12)
    assert token_paths(tree) == token_paths(joined)
    chain, _ = draft(anything, table, nodes=12, chain=True)
    assert chain.tokens.tolist() == build_chain(table, 9, 12).tokens.tolist()


def test_probabilities_of_allowed_drafts_are_normalised():
    """The tokens that the table does not list share what it leaves."""
    tokens = np.array([[[3, 1, 6, 2]]], np.int32)
    log_probs = np.log(np.float32([[[0.4, 0.3, 0.1, 0.1]]]))
    table = TransitionTable(tokens, log_probs, np.full((1, 1, 4), -1, np.int32))
    tree, _ = draft(lambda t: [1, 2] if len(t) == 1 else anything(t), table)
    assert tree.tokens.tolist() == [9, 1, 2]
    np.testing.assert_allclose(np.exp(tree.log_probs[1:]), [0.75, 0.25], rtol=1e-6)
    assert tree.matches.tolist() == [0, 0, 0]
    tree, _ = draft(lambda t: [1, 2, 60] if len(t) == 1 else anything(t), table)
    total = 0.4 + 0.1 / (416 - 4 + 1)  # the mask has 13 words
    np.testing.assert_allclose(np.exp(tree.log_probs[1:]), [0.3 / total, 0.1 / total], rtol=1e-6)


def test_a_drafter_that_knows_nothing_of_what_is_allowed():
    """Its probability of the allowed token is below the smallest number."""
    log_probs = np.array([[[0, -1000]]], np.float32)
    table = TransitionTable(np.array([[[3, 1]]], np.int32), log_probs, np.full((1, 1, 2), -1))
    tree, _ = draft(lambda t: [1, 2] if len(t) == 1 else anything(t), table)
    assert tree.tokens.tolist() == [9, 1, 2]
    np.testing.assert_allclose(np.exp(tree.log_probs[1:]), [0.5, 0.5])


def test_children_of_allowed_drafts_are_their_own():
    """Forbidden tokens leave, and each other token keeps what may follow it."""
    table = random_table("smooth", (3, 4, 6), 1)
    kept = set(table.tokens[0, 0, ::2].tolist())
    tree, _ = draft(lambda t: sorted(kept) if len(t) == 1 else anything(t), table, nodes=400)
    every = token_paths(build_tree(table, 9, 2000))
    drafted = {path for path in every if len(path) == 1 or path[1] in kept}
    assert set(token_paths(tree)) == drafted
    assert 1 < len(drafted) < len(every)


TEXT = [31, 7, 32, 33, 8, 34, 35]


def test_forced_tokens_are_drafted_without_a_drafter():
    tree, _ = draft(spell(TEXT), nodes=6)
    assert tree.tokens.tolist() == [9, *TEXT[:5]]
    assert tree.is_chain
    assert (tree.log_probs == 0).all()
    assert draft(spell(TEXT), deepest=3)[0].tokens.tolist() == [9, *TEXT[:3]]
    assert len(draft(anything)[0]) == 1
    tree, masks = draft(spell(TEXT), stops={TEXT[3]})
    assert tree.tokens.tolist() == [9, *TEXT[:4]]
    assert len(masks) == len(tree)


def test_forced_tokens_are_drafted_below_every_draft_and_copy():
    """Drafts go on below a forced chain where the drafter has the forced token."""
    tokens = np.array([[[9, 50]], [[31, 51]], [[7, 52]], [[53, 54]]], np.int32)
    log_probs = np.log(np.full((4, 1, 2), 0.5, np.float32))
    next_row = np.array([[[0, 0]]] * 3 + [[[-1, -1]]], np.int32)
    table = TransitionTable(tokens, log_probs, next_row)

    def following(tokens):
        return (
            [31]
            if tokens[-1] == 9 and len(tokens) > 1
            else [7]
            if tokens[-1] == 31
            else anything(tokens)
        )

    tree, _ = draft(following, table, nodes=40)
    paths = token_paths(tree)
    assert (9, 9, 31, 7) in paths
    assert {(9, 9, 31, 7, 53), (9, 50, 31, 7), (9, 50, 51)} < {*paths}
    assert (9, 9, 51) not in paths
    chain, _ = draft(following, table, nodes=40, chain=True)
    assert chain.is_chain
    assert chain.tokens.tolist() == [9, 9, 31, 7, 53]
    proposal = SuffixTree(2, [-1, 9], [-1, 0], [1.0, 0.6], [1.0, 1.0], [0, 2])
    copied, _ = draft(following, None, proposal)
    assert copied.tokens.tolist() == [9, 9, 31, 7]
    np.testing.assert_allclose(np.exp(copied.log_probs), [1, 0.6, 0.6, 0.6])


def test_few_choices_are_children():
    tree, _ = draft(lambda tokens: [5, 6] if len(tokens) < 3 else anything(tokens))
    assert sorted(token_paths(tree)[3:]) == [(9, a, b) for a in (5, 6) for b in (5, 6)]
    np.testing.assert_allclose(np.exp(tree.log_probs[:3]), [1, 0.5, 0.5])
    assert len(draft(lambda _: range(200))[0]) == 1


def test_choices_in_the_same_state_are_probable():
    """The example of the module, and a text of another salt."""
    mask = np.bitwise_or.reduce(only(np.array([40, 41], np.int32), VOCAB))
    seen = Choices()
    for _ in range(3):
        seen.observe("", mask, 40)
        seen.observe("another", mask, 41)
    tree, _ = draft(lambda tokens: [40, 41] if len(tokens) == 1 else anything(tokens), seen=seen)
    assert tree.tokens.tolist() == [9, 40, 41]
    np.testing.assert_allclose(np.exp(tree.log_probs[1:]), [0.875, 0.125])
    assert tree.matches[1:].tolist() == [4, 4]


def test_choices_are_few_tokens_of_few_states():
    choices = Choices(max_states=3)
    masks = [np.bitwise_or.reduce(only(np.array([n, n + 1], np.int32), VOCAB)) for n in range(5)]
    for n, mask in [*enumerate(masks), (2, masks[2])]:
        choices.observe("", mask, n)
    choices.observe("", np.bitwise_or.reduce(only(np.arange(200, dtype=np.int32), VOCAB)), 5)
    choices.observe("", only(np.array([4], np.int32), VOCAB)[0], 4)
    found = [choices.seen("", Allowed(mask)) for mask in masks]
    assert found == [Counter(), Counter(), Counter({2: 2}), Counter({3: 1}), Counter({4: 1})]
    choices.observe("", masks[0], 0)
    assert choices.seen("", Allowed(masks[3])) == Counter(), "the least recent state is dropped"
    assert choices.seen("", Allowed(masks[2])) == Counter({2: 2})


def test_masks_are_read_as_they_are_written():
    rng = np.random.default_rng(0)
    for count in (0, 1, 5, 390):
        tokens = np.sort(rng.choice(VOCAB, count, replace=False)).astype(np.int32)
        words = np.zeros(-(-VOCAB // 32), np.uint32)
        for row in only(tokens, VOCAB):
            words |= row
        allowed = Allowed(words)
        assert allowed.tokens() == tokens.tolist() == [t for t in range(VOCAB) if allowed.has(t)]
        assert allowed.count == count
    assert all(a < b for a, b in pairwise(allowed.tokens()))
