"""Sampled sequences have the target's distribution, and a seed gives one sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from fake_models import BUDGETS, CHI_SQUARE_LIMIT, DRAFTING, SAMPLINGS, FakeBackend, run

from treeflash.config import METHODS, SamplingConfig
from treeflash.decoding.sampling import position_keys
from treeflash.decoding.transitions import TransitionTable
from treeflash.testing.comparisons import tokens_of
from treeflash.testing.pairs import combine

VOCAB = 6
BIGRAMS = np.random.default_rng(11).normal(0, 1.2, (VOCAB, VOCAB)).astype(np.float32)
TEMPERATURE = 1.3


def bigram_backend() -> FakeBackend:
    """A target whose next token depends on the last alone, and drafts that are half right."""
    noise = np.random.default_rng(12).normal(0, 1, (VOCAB, VOCAB))
    logits = BIGRAMS + noise
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def propose(sequence: Sequence[int], m: int, k: int) -> TransitionTable:
        previous = np.tile(np.arange(min(m, VOCAB), dtype=np.int32), (3, 1))
        first = np.full((1, previous.shape[1]), sequence[-1], np.int32)
        rows = log_probs[np.concatenate([first, previous])]
        tokens = np.argsort(-rows, -1)[..., : min(k, VOCAB)].astype(np.int32)
        best = np.take_along_axis(rows, tokens, -1).astype(np.float32)
        if m == 1:
            return TransitionTable.from_marginals(tokens[:, 0], best[:, 0])
        return TransitionTable.from_candidates(previous, tokens, best)

    return FakeBackend(lambda sequence: BIGRAMS[sequence[-1]], propose, VOCAB)


class TestSampling:
    @pytest.mark.sample(10)
    @pytest.mark.parametrize(
        ("method", "budget", "sampling"), combine(DRAFTING, BUDGETS, SAMPLINGS)
    )
    def test_every_budget_equals_plain_decoding(self, method, budget, sampling):
        config = {"sampling": SAMPLINGS[sampling], "max_tokens": 40}
        expected = run(bigram_backend(), [1, 2], method="ar", **config)
        steps = run(bigram_backend(), [1, 2], method=method, budget=budget, **config)
        assert tokens_of(steps) == tokens_of(expected)

    @pytest.mark.parametrize("method", METHODS)
    def test_each_node_has_the_key_of_the_position_after_it(self, method):
        backend = bigram_backend()
        sampling = SamplingConfig(temperature=1, seed=77)
        run(backend, [1, 2, 3], method=method, sampling=sampling, max_tokens=20)
        assert backend.verifier.keys[0][0] == 3  # the first new token's position
        for position, key in backend.verifier.keys:
            assert key == position_keys(77, np.array([position], np.int32))[0].tolist()

    @pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
    @pytest.mark.parametrize("method", DRAFTING)
    def test_drafts_have_the_noise_of_the_tokens_that_they_propose(self, method, sampling):
        backend = bigram_backend()
        assert backend.head is not None
        run(backend, [1, 2, 3], method=method, sampling=sampling, max_tokens=20, budget=3)
        drafted = [*backend.drafter.noise, *backend.head.noise]
        assert drafted[0][0] == 4  # after the prompt and the first new token
        for position, noise in drafted:
            assert (noise is None) == sampling.greedy
            if noise is not None:
                positions = position + np.arange(3, dtype=np.int32)  # three nodes reach no deeper
                expected = position_keys(sampling.seed, positions)
                np.testing.assert_array_equal(noise.keys, expected)
                assert noise.scales.tolist() == [np.float32(sampling.temperature)] * 3

    def test_seeds_give_different_texts(self):
        sequences = {
            tuple(
                tokens_of(
                    run(
                        bigram_backend(),
                        [1],
                        sampling=SamplingConfig(temperature=1, seed=seed),
                        max_tokens=12,
                    )
                )
            )
            for seed in range(20)
        }
        assert len(sequences) == 20

    # The conformance suite has a test of distributions for the reference in every run.
    @pytest.mark.nightly
    @pytest.mark.parametrize("method", ["dflash", "ddtree", "treeflash"])
    def test_tree_decoding_has_the_targets_distribution(self, method):
        """What follows each token in texts of several seeds, against the exact probabilities."""
        texts, length, backend = 70, 60, bigram_backend()
        counts = np.zeros((VOCAB, VOCAB))
        accepted = 0
        for seed in range(texts):
            sampling = SamplingConfig(temperature=TEMPERATURE, seed=seed)
            steps = run(
                backend, [2], method=method, budget=12, sampling=sampling, max_tokens=length
            )
            tokens = tokens_of(steps)
            np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
            accepted += sum(len(step.path) - 1 for step in steps[1:])
        assert accepted > texts * length / 5
        probs = np.exp(BIGRAMS.astype(np.float64) / TEMPERATURE)
        probs /= probs.sum(-1, keepdims=True)
        expected = counts.sum(1, keepdims=True) * probs
        assert expected.min() >= 5
        assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_LIMIT
