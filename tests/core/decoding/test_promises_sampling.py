"""What is reported about a token, and what a constraint leaves of a drafter's proposals."""

from __future__ import annotations

import numpy as np
import pytest

from treeflash.decoding.sampling import LogitEdits, SamplingParams, position_keys, prune, sample
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import build_tree
from treeflash.testing.comparisons import path_to
from treeflash.testing.pairs import SAMPLINGS

VOCAB = 40


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_reported_log_probs_are_the_models_own(sampling, edited, masked):
    """Before penalties, biases, masks, temperature and filters, whatever was sampled."""
    rng = np.random.default_rng(4)
    n = 5
    logits = (2 * rng.normal(size=(n, VOCAB))).astype(np.float32)
    best = logits.argmax(-1)
    edits = allowed = None
    if edited:
        bias = np.full(n, -50, np.float32)
        edits = LogitEdits(np.arange(n), best, np.ones(n, np.float32), bias)
    if masked:
        bits = np.ones((n, 64), np.bool_)
        bits[np.arange(n), best] = False
        allowed = np.packbits(bits, -1, bitorder="little").view(np.uint32)
    keys = None if sampling.greedy else position_keys(1, np.arange(n, dtype=np.int32))
    found = sample(logits, SamplingParams(sampling, keys, edits, allowed, 3))
    expected = log_softmax(logits)
    np.testing.assert_allclose(
        found.log_probs.sampled, expected[np.arange(n), found.tokens], atol=1e-5
    )
    ranked = np.argsort(-expected, -1)[:, :3]
    assert found.log_probs.tokens.tolist() == ranked.tolist()
    np.testing.assert_allclose(
        found.log_probs.values, np.take_along_axis(expected, ranked, -1), atol=1e-5
    )
    if edited or masked:
        assert not (found.tokens == best).any(), "another token was sampled"


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
