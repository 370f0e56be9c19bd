"""The sampler: filters, noise, and the distribution of its choices."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import (
    filtered_probs,
    gumbel,
    noisy_logits,
    position_keys,
    sample_tokens,
)
from treeflash.errors import NumericalError

# Exceeded with probability 0.001, with 11 degrees of freedom.
CHI_SQUARE_LIMIT = 31.26


def keys(count: int) -> np.ndarray:
    """The keys of the first positions."""
    return position_keys(0, np.arange(count, dtype=np.int32))


FILTERS = [
    SamplingConfig(temperature=1),
    SamplingConfig(temperature=0.4),
    SamplingConfig(temperature=3),
    SamplingConfig(temperature=1, top_k=1),
    SamplingConfig(temperature=1, top_k=5),
    SamplingConfig(temperature=1, top_k=12),
    SamplingConfig(temperature=1, top_k=1000),
    SamplingConfig(temperature=1, top_p=0.9),
    SamplingConfig(temperature=1, top_p=0.5),
    SamplingConfig(temperature=1, top_p=1e-9),
    SamplingConfig(temperature=1, min_p=0.1),
    SamplingConfig(temperature=1, min_p=1),
    SamplingConfig(temperature=1.5, top_k=8, top_p=0.8),
    SamplingConfig(temperature=0.7, top_k=9, top_p=0.95, min_p=0.05),
]


def naive_probs(logits: list[float], sampling: SamplingConfig) -> list[float]:
    """The filters by the book, one row in plain Python; normalised at the end."""
    best = max(logits)
    probs = [math.exp((logit - best) / sampling.temperature) for logit in logits]
    if sampling.top_k:
        kth = sorted(probs, reverse=True)[: sampling.top_k][-1]
        probs = [p if p >= kth else 0.0 for p in probs]
    if sampling.top_p < 1:
        total, mass = sum(probs), 0.0
        for least in sorted(probs, reverse=True):
            mass += least / total
            if mass >= sampling.top_p:
                break
        probs = [p if p >= least else 0.0 for p in probs]
    if sampling.min_p:
        probs = [p if p >= sampling.min_p * max(probs) else 0.0 for p in probs]
    total = sum(probs)
    return [p / total for p in probs]


class TestFilters:
    @pytest.mark.parametrize("sampling", FILTERS, ids=str)
    @pytest.mark.parametrize("vocab_size", [1, 2, 12, 300])
    def test_filters_equal_naive_filters(self, sampling, vocab_size):
        logits = np.random.default_rng(vocab_size).normal(0, 2, (40, vocab_size))
        logits = logits.astype(np.float32)
        probs = filtered_probs(logits, sampling)
        probs /= probs.sum(-1, keepdims=True)
        expected = np.array([naive_probs(row, sampling) for row in logits.tolist()])
        np.testing.assert_array_equal(probs > 0, expected > 0)
        np.testing.assert_allclose(probs, expected, rtol=1e-12)

    def test_rows_do_not_touch_each_other(self):
        logits = np.random.default_rng(3).normal(0, 3, (30, 20)).astype(np.float32)
        together = filtered_probs(logits, FILTERS[-1])
        alone = np.concatenate([filtered_probs(row[None], FILTERS[-1]) for row in logits])
        np.testing.assert_array_equal(together, alone)

    def test_large_logits_do_not_overflow(self):
        logits = np.array([[3e38, -3e38, 3e38]], np.float32)
        probs = filtered_probs(logits, SamplingConfig(temperature=1))
        assert probs.tolist() == [[0.5, 0, 0.5]]

    def test_impossible_tokens_stay_impossible(self):
        logits = np.array([[0, -np.inf, 0]], np.float32)
        assert filtered_probs(logits, SamplingConfig(temperature=9)).tolist() == [[0.5, 0, 0.5]]

    @pytest.mark.parametrize(
        ("sampling", "kept"),
        [
            (SamplingConfig(temperature=1, top_k=1), [0]),
            (SamplingConfig(temperature=1, top_k=2), [0, 1, 3, 4]),
            (SamplingConfig(temperature=1, top_k=4), [0, 1, 3, 4]),
            (SamplingConfig(temperature=1, top_k=5), [0, 1, 2, 3, 4]),
            (SamplingConfig(temperature=1, top_p=0.5), [0]),
            (SamplingConfig(temperature=1, top_p=0.54), [0, 1, 3, 4]),
            (SamplingConfig(temperature=1, top_p=0.99), [0, 1, 2, 3, 4]),
            (SamplingConfig(temperature=1, min_p=0.24), [0, 1, 3, 4]),
            (SamplingConfig(temperature=1, min_p=0.26), [0]),
        ],
        ids=str,
    )
    def test_ties_stay_together(self, sampling, kept):
        """Probabilities 8, 2, 1, 2, 2 of 15."""
        logits = np.log(np.array([[8, 2, 1, 2, 2]], np.float64)).astype(np.float32)
        assert np.flatnonzero(filtered_probs(logits, sampling)[0]).tolist() == kept

    def test_no_filter_drops_no_token(self):
        """Tokens stay whose probability is lost to rounding in the sum of the others."""
        logits = np.array([[1, -50, 2, -90]], np.float32)
        assert (filtered_probs(logits, SamplingConfig(temperature=1)) > 0).all()

    @pytest.mark.parametrize("sampling", FILTERS, ids=str)
    def test_a_flat_row_keeps_every_token(self, sampling):
        assert (filtered_probs(np.zeros((1, 50), np.float32), sampling) > 0).all()


class TestChoose:
    @pytest.mark.sample(5)
    @pytest.mark.parametrize("draws", [5000, pytest.param(20_000, marks=pytest.mark.nightly)])
    @pytest.mark.parametrize("sampling", FILTERS, ids=str)
    def test_distribution(self, sampling, draws):
        logits = np.array([1.5, 0, 2, -1, 0.5, 0.2, 1, -0.5, 1.8, 0.9, -0.2, 0.7])
        expected = draws * np.array(naive_probs(np.float32(logits).tolist(), sampling))
        rows = np.broadcast_to(np.float32(logits), (draws, len(logits)))
        counts = np.bincount(sample_tokens(rows, sampling, keys(draws)), minlength=len(logits))
        possible = expected > 0
        assert counts[~possible].sum() == 0
        rare = possible & (expected < 5)  # pooled, or chi-square is no fair measure
        common = possible & ~rare
        counts = np.append(counts[common], counts[rare].sum())
        expected = np.append(expected[common], max(expected[rare].sum(), 1e-9))
        assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_LIMIT

    def test_takes_the_largest_sum_of_logit_and_noise(self):
        """The noise of a colder temperature is smaller."""
        logits = np.random.default_rng(1).normal(size=(40, 30)).astype(np.float32)
        noise = gumbel(keys(40), np.arange(30, dtype=np.int32))
        for temperature in (0.3, 1.0, 2.0):
            chosen = sample_tokens(logits, SamplingConfig(temperature=temperature), keys(40))
            assert chosen.tolist() == (logits + temperature * noise).argmax(-1).tolist()

    def test_impossible_tokens_are_never_chosen(self):
        logits = np.full((500, 9), -np.inf, np.float32)
        logits[:, [3, 4, 6]] = [0.1, 0.2, 0.3]
        tokens = sample_tokens(logits, SamplingConfig(temperature=1), keys(500))
        assert set(tokens.tolist()) == {3, 4, 6}

    @pytest.mark.parametrize("sampling", FILTERS, ids=str)
    def test_noise_is_added_to_the_tokens_that_filters_keep(self, sampling):
        logits = np.random.default_rng(2).normal(0, 2, (50, 40)).astype(np.float32)
        kept = filtered_probs(logits, sampling) > 0
        noisy = noisy_logits(logits, sampling, keys(50))
        np.testing.assert_array_equal(np.isfinite(noisy), kept)
        noise = gumbel(keys(50), np.arange(40, dtype=np.int32))
        expected = logits + sampling.temperature * noise
        np.testing.assert_allclose(noisy[kept], expected[kept], rtol=1e-6, atol=1e-6)

    def test_rows_together_equal_rows_alone(self):
        """A tree's node gets the token that plain decoding would get there."""
        rng = np.random.default_rng(4)
        logits, all_keys = rng.normal(0, 2, (200, 50)).astype(np.float32), keys(200)
        for sampling in FILTERS:
            together = sample_tokens(logits, sampling, all_keys)
            alone = [
                int(sample_tokens(logits[i : i + 1], sampling, all_keys[i : i + 1])[0])
                for i in range(200)
            ]
            assert together.tolist() == alone

    def test_greedy_takes_the_best_and_the_first_of_equals(self):
        logits = np.array([[0, 3, 1], [2, -1, 2], [-np.inf, -5, -np.inf]], np.float32)
        tokens = sample_tokens(logits, SamplingConfig())
        assert tokens.tolist() == [1, 0, 1]
        assert tokens.dtype == np.int32

    def test_greedy_ignores_filters_and_noise(self):
        logits = np.array([[0, 3, 1]], np.float32)
        sampling = SamplingConfig(top_k=2, top_p=0.1, min_p=0.9, seed=4)
        assert sample_tokens(logits, sampling, keys(1)).tolist() == [1]

    @pytest.mark.parametrize(
        "sampling", [SamplingConfig(), SamplingConfig(temperature=1, top_p=0.9)], ids=str
    )
    @pytest.mark.parametrize(
        "row",
        [[0, np.nan, 1], [np.nan, np.nan, np.nan], [0, np.inf, 1], [-np.inf, -np.inf, -np.inf]],
        ids=str,
    )
    def test_rows_that_are_not_finite_raise(self, sampling, row):
        logits = np.array([[0, 1, 2], row, [0, 1, 2]], np.float32)
        with pytest.raises(NumericalError, match=r"not finite \(NaN or infinity\).*float32"):
            sample_tokens(logits, sampling, keys(3))


def test_top_p_keeps_no_token_beyond_the_mass_that_it_names():
    """Probabilities of exactly a half and two quarters: the first alone reaches one half."""
    sampling = SamplingConfig(temperature=1 / math.log(2), top_p=0.5)
    logits = np.array([[1, 0, 0]], np.float32)
    assert filtered_probs(logits, replace(sampling, top_p=1.0)).tolist() == [[0.5, 0.25, 0.25]]
    assert filtered_probs(logits, sampling).tolist() == [[0.5, 0, 0]]


@pytest.mark.parametrize("top_p", [1e-300, 1e-45, 1e-9])
def test_the_smallest_top_p_keeps_one_token(top_p):
    logits = np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32)
    kept = filtered_probs(logits, SamplingConfig(temperature=1, top_p=top_p)) > 0
    assert kept.sum(-1).tolist() == [1] * 5
    np.testing.assert_array_equal(kept.argmax(-1), logits.argmax(-1))
