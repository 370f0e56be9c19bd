"""Constrained trees: masks per node, pruned proposals, and exact decoding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from treeflash.config import METHODS, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.sampling import constrain, prune, unpack
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, build_tree
from treeflash.reference.backend import load
from treeflash.testing.comparisons import path_to, random_tree

VOCAB = 40


class Alternates:
    """A token may follow one of another remainder modulo `modulus`."""

    end_tokens = frozenset()

    def __init__(self, vocab_size=VOCAB, modulus=3):
        self.vocab_size, self.modulus = vocab_size, modulus
        self.tokens = []

    def permitted(self, tokens):
        """The allowed tokens after these, one by one."""
        last = tokens[-1] % self.modulus if tokens else None
        return [t for t in range(self.vocab_size) if t % self.modulus != last]

    def allowed(self):
        words = np.zeros(-(-self.vocab_size // 32), np.uint32)
        for token in self.permitted(self.tokens):
            words[token // 32] |= np.uint32(1 << (token % 32))
        return words

    def advance(self, token):
        assert token in self.permitted(self.tokens)
        self.tokens.append(token)

    def rollback(self, tokens):
        assert tokens
        del self.tokens[-tokens:]


@pytest.mark.parametrize("seed", range(5))
def test_trees_lose_forbidden_nodes_and_all_below_them(seed):
    rng = np.random.default_rng(seed)
    tree, constraint = random_tree(rng, 4, 40, VOCAB), Alternates(modulus=6)
    constraint.advance(4)
    found, masks = constrain(tree, constraint)
    assert constraint.tokens == [4]
    paths = [tree.tokens[path_to(tree, node)].tolist() for node in range(len(tree))]
    kept = [
        path for path in paths if all(b in constraint.permitted([a]) for a, b in pairwise(path))
    ]
    assert [found.tokens[path_to(found, node)].tolist() for node in range(len(found))] == kept
    assert 1 < len(kept) < len(paths)
    for path, mask in zip(kept, unpack(masks, VOCAB), strict=True):
        assert np.flatnonzero(mask).tolist() == constraint.permitted(path)


def test_pruned_tables_propose_allowed_tokens_first():
    tokens = np.array([[3, 1, 6, 2], [1, 2, 3, 4]], np.int32)
    log_probs = np.log(np.tile(np.float32([0.4, 0.3, 0.2, 0.1]), (2, 1)))
    table = TransitionTable.from_marginals(tokens, log_probs)
    constraint = Alternates()
    constraint.advance(9)
    pruned = prune(table, constraint.allowed(), VOCAB)
    assert pruned.tokens[0, 0, :2].tolist() == [1, 2]
    np.testing.assert_array_equal(np.exp(pruned.log_probs[0, 0, 2:]), [0, 0])
    np.testing.assert_allclose(np.exp(pruned.log_probs[0, 0, :2]), [0.3, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(pruned.tokens[1], table.tokens[1])
    tree = build_tree(pruned, 9, 64)
    assert set(tree.tokens[tree.depths == 1].tolist()) == {1, 2}
    assert table.tokens[0, 0].tolist() == [3, 1, 6, 2], "the table itself is as it was"


def test_a_root_without_children():
    tree, masks = constrain(DraftTree.root_only(4), Alternates())
    assert (len(tree), len(masks)) == (1, 1)


@pytest.fixture
def backend(tiny_pair):
    return load(*tiny_pair, LoadConfig())


@pytest.mark.parametrize("budget", [1, 12, 64])
@pytest.mark.parametrize(
    "sampling", [SamplingConfig(), SamplingConfig(temperature=0.9, seed=5)], ids=["greedy", "seed"]
)
def test_constrained_decoding_equals_plain_constrained_decoding(backend, sampling, budget):
    scheduler = Scheduler(backend)
    found = {}
    for method in METHODS:
        config = DecodeConfig(method=method, budget=budget, max_tokens=20, sampling=sampling)
        request_id = scheduler.submit(
            Request(
                prompt_ids=[5, 6, 7], config=config, constraint=Alternates(backend.vocab_size, 2)
            )
        )
        found[request_id] = []
    accepted = 0
    for request_id, step in scheduler.run():
        found[request_id] += step.tokens
        accepted += 0 if step.path is None else len(step.path) - 1
    plain, *others = found.values()
    assert len(plain) == 20
    assert all(a % 2 != b % 2 for a, b in pairwise(plain))
    assert others == [plain] * len(others)
    assert accepted or budget == 1


def test_an_error_of_a_constraint_ends_its_text_alone(backend):
    class Fails(Alternates):
        def advance(self, token):
            raise ValueError("no such rule")

    scheduler = Scheduler(backend)
    config = DecodeConfig(budget=6, max_tokens=8)
    for constraint in (Fails(backend.vocab_size), None):
        scheduler.submit(Request(prompt_ids=[5, 6], config=config, constraint=constraint))
    found = {}
    for request_id, event in scheduler.run():
        found.setdefault(request_id, []).append(event)
    bad, good = found.values()
    assert str(bad[-1]) == "no such rule"
    assert sum(len(step.tokens) for step in good) == 8


@pytest.mark.parametrize("seed", range(20))
def test_the_children_of_an_allowed_token_stay_its_own(seed):
    """Pruning moves the first tokens; each takes its probability and its own next row along."""
    rng = np.random.default_rng(seed)
    depths, rows, k = 3, 4, 6
    tokens = np.stack(
        [[rng.choice(VOCAB, k, replace=False) for _ in range(rows)] for _ in range(depths)]
    ).astype(np.int32)
    probs = rng.dirichlet(np.ones(k), (depths, rows))
    log_probs = -np.sort(-np.log(probs), -1).astype(np.float32)
    next_row = rng.integers(0, rows, (depths, rows, k)).astype(np.int32)
    table = TransitionTable(tokens, log_probs, next_row)
    bits = np.zeros(64, np.bool_)
    bits[rng.choice(tokens[0, 0], 3, replace=False)] = True
    allowed = np.packbits(bits, bitorder="little").view(np.uint32)
    pruned = prune(table, allowed, VOCAB)
    before = {
        int(t): (p, r)
        for t, p, r in zip(tokens[0, 0], log_probs[0, 0], next_row[0, 0], strict=True)
    }
    after = [
        (int(t), (p, r))
        for t, p, r in zip(
            pruned.tokens[0, 0], pruned.log_probs[0, 0], pruned.next_row[0, 0], strict=True
        )
    ]
    assert [t for t, _ in after[:3]] == [int(t) for t in tokens[0, 0] if bits[t]]
    assert dict(after[:3]) == {t: before[t] for t, _ in after[:3]}
    assert {p for _, (p, _) in after[3:]} == {-np.inf}
    for part, whole in ((pruned.tokens, tokens), (pruned.log_probs, log_probs)):
        np.testing.assert_array_equal(part[1:], whole[1:])
    np.testing.assert_array_equal(table.log_probs, log_probs)

    def paths(tree):
        nodes = [path_to(tree, node) for node in range(1, len(tree))]
        return {tuple(tree.tokens[path].tolist()): tree.log_probs[path[-1]] for path in nodes}

    every = paths(build_tree(table, 1, 2000))
    kept = {path: value for path, value in every.items() if bits[path[1]]}
    assert 3 < len(kept) < len(every)
    found = paths(build_tree(pruned, 1, 2000))
    assert {p: pytest.approx(x, abs=1e-5) for p, x in kept.items()} == found
