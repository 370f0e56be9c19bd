"""The expected accepted length of a tree is the sum of its nodes' probabilities.

DDTree's Proposition 1: if the target's conditionals are the drafter's marginals, the mean number of
accepted drafts is the sum of the probabilities of the drafted nodes, for every tree. It holds the
builder, the sampler and the acceptance together, at every budget and temperature.
"""

from __future__ import annotations

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import SamplingParams, sample
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, accept, build_chain, build_tree

DEPTHS, VOCAB, TEXTS = 5, 7, 500
ERRORS = 3.5
"""Standard errors within which the mean lies; the seeds are the same in every run."""


def marginals(rng: np.random.Generator, temperature: float) -> tuple[np.ndarray, TransitionTable]:
    """Draw the target's (DEPTHS + 1, VOCAB) logits by depth, and its drafter's table of them."""
    logits = rng.normal(0, 1.5, (DEPTHS + 1, VOCAB)).astype(np.float32)
    scaled = (logits / temperature).astype(np.float64)
    log_probs = scaled - np.logaddexp.reduce(scaled, -1, keepdims=True)
    order = np.argsort(-log_probs[:DEPTHS], -1, kind="stable")
    sorted_log_probs = np.take_along_axis(log_probs[:DEPTHS], order, -1).astype(np.float32)
    return logits, TransitionTable.from_marginals(order.astype(np.int32), sorted_log_probs)


def accepted_lengths(tree: DraftTree, logits: np.ndarray, temperature: float) -> np.ndarray:
    """The accepted drafts of `TEXTS` samples: texts of one seed, far from each other."""
    # Every node of a depth has its own draw, as after different prefixes of a real target.
    positions = 64 * np.arange(TEXTS, dtype=np.int32)[:, None] + np.arange(
        len(tree), dtype=np.int32
    )
    sampling = SamplingConfig(temperature=temperature, seed=5)
    params = SamplingParams.from_positions(sampling, positions.ravel())
    sampled = sample(np.tile(logits[tree.depths], (TEXTS, 1)), params)
    texts = sampled.tokens.reshape(positions.shape)
    return np.array([len(accept(tree, tokens).path) - 1 for tokens in texts])


@pytest.mark.sample(2)
@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("budget", [2, 8, 32])
def test_the_mean_accepted_length_is_the_sum_of_probabilities(budget, temperature):
    logits, table = marginals(np.random.default_rng(budget), temperature)
    for tree in (build_tree(table, 0, budget), build_chain(table, 0, budget)):
        expected = np.exp(tree.log_probs[1:]).sum()
        lengths = accepted_lengths(tree, logits, temperature)
        error = lengths.std() / np.sqrt(TEXTS)
        assert abs(lengths.mean() - expected) <= ERRORS * error, (expected, lengths.mean(), error)


def test_no_tree_of_that_size_promises_more():
    """The builder takes the nodes whose probabilities sum to the most."""
    rng = np.random.default_rng(3)
    _, table = marginals(rng, 1.0)
    best = np.exp(build_tree(table, 0, 12).log_probs[1:]).sum()
    whole = build_tree(table, 0, 2000)
    for _ in range(200):
        chosen = [0]
        while len(chosen) < 12:
            allowed = set(np.flatnonzero(np.isin(whole.parents, chosen))) - set(chosen)
            chosen.append(int(rng.choice(sorted(allowed))))
        assert np.exp(whole.log_probs[chosen[1:]]).sum() <= best + 1e-9


def test_a_tree_of_other_probabilities_is_noticed():
    """The proposition's sum tells a drafter whose marginals are not the target's."""
    logits, table = marginals(np.random.default_rng(1), 1.0)
    tree = build_tree(table, 0, 16)
    lengths = accepted_lengths(tree, logits, 0.3)
    expected = np.exp(tree.log_probs[1:]).sum()
    assert abs(lengths.mean() - expected) > ERRORS * lengths.std() / np.sqrt(TEXTS)
