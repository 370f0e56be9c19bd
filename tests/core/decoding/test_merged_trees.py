"""Trees under a constraint: what it allows, what it forces, and what followed its states before."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from random_tables import KINDS, SHAPES, random_table

from treeflash.decoding.merged_trees import Allowed, Choices, merge, merge_allowed
from treeflash.decoding.sampling import only, unpack
from treeflash.decoding.suffix import SuffixDrafter, SuffixTree
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import build_chain, build_tree
from treeflash.testing.comparisons import paths as token_paths

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


def draft(following, table=None, proposal=None, *, nodes=16, deepest=99, seen=None, chain=False):
    constraint = Rules(following, [9])
    known = Choices() if seen is None else seen
    tree, masks = merge_allowed(
        *(table, proposal, 9, nodes, constraint, lambda allowed: known.seen("", allowed)),
        deepest=deepest,
        chain=chain,
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
