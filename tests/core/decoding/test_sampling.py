"""The sampler: random numbers keyed by position, filters, and the distribution of its choices."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import choose, filtered_probs, uniforms
from treeflash.errors import NumericalError

# Exceeded with probability 0.001, by degrees of freedom.
CHI_SQUARE_LIMIT = {11: 31.26, 15: 37.70, 63: 103.44}
# At positions 0, 1, 7 and 4095.
NUMBERS_OF_SEED_0 = [
    0.011546754286331562,
    0.24154919656271812,
    0.9860662462666749,
    0.4151737541717264,
]
NUMBERS_OF_LAST_SEED = [
    0.23494158814525556,
    0.7173107484541781,
    0.30617007215776193,
    0.02739980712083434,
]
SEEDS = [0, 1, 2, 12345, 2**32, 2**63, 2**64 - 1]


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def positions(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


class TestUniforms:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_number_depends_on_seed_and_position_alone(self, seed: int) -> None:
        """Whatever else is asked for, in whatever order, however often."""
        stream = uniforms(seed, np.arange(300, dtype=np.int32))
        for position in range(300):
            assert uniforms(seed, positions(position))[0] == stream[position]
        rng = np.random.default_rng(0)
        for size in (1, 2, 5, 64, 500):
            asked = rng.integers(0, 300, size).astype(np.int32)
            np.testing.assert_array_equal(uniforms(seed, asked), stream[asked])

    @pytest.mark.parametrize("seed", SEEDS)
    def test_numbers_are_the_documented_stream(self, seed: int) -> None:
        stream = np.random.Generator(np.random.Philox(key=seed)).random(100)
        np.testing.assert_array_equal(uniforms(seed, np.arange(100, dtype=np.int32)), stream)

    def test_numbers_never_change(self) -> None:
        """A seed quoted in a bug report must give the same text for ever."""
        asked = positions(0, 1, 7, 4095)
        assert uniforms(0, asked).tolist() == NUMBERS_OF_SEED_0
        assert uniforms(2**64 - 1, asked).tolist() == NUMBERS_OF_LAST_SEED

    def test_nodes_of_one_depth_share_a_number(self) -> None:
        first, second, third = uniforms(5, positions(9, 9, 10))
        assert first == second != third

    def test_far_positions_are_cheap(self) -> None:
        """Reached in one step: a stream up to there would take 16 GB."""
        last = 2**31 - 1
        pair = uniforms(3, positions(last - 1, last))
        assert pair[1] == uniforms(3, positions(last))[0]
        assert pair[0] != pair[1]

    def test_shape_type_and_range(self) -> None:
        numbers = uniforms(1, np.arange(10_000, dtype=np.int32))
        assert numbers.shape == (10_000,)
        assert numbers.dtype == np.float64
        assert (numbers >= 0).all()
        assert (numbers < 1).all()

    def test_every_bit_of_the_seed_counts(self) -> None:
        seeds = [0] + [1 << bit for bit in range(64)]
        assert len({uniforms(seed, positions(17))[0] for seed in seeds}) == len(seeds)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_uniform_over_positions(self, seed: int) -> None:
        numbers = uniforms(seed, np.arange(16_000, dtype=np.int32))
        counts = np.bincount((numbers * 16).astype(int), minlength=16)
        assert chi_square(counts, 1000) < CHI_SQUARE_LIMIT[15]

    def test_uniform_over_seeds(self) -> None:
        """Neighbouring seeds at one position, as in a loop over seeds."""
        numbers = np.array([uniforms(seed, positions(40))[0] for seed in range(8000)])
        counts = np.bincount((numbers * 16).astype(int), minlength=16)
        assert chi_square(counts, 500) < CHI_SQUARE_LIMIT[15]

    @pytest.mark.parametrize("other", ["next position", "next seed"])
    def test_neighbours_are_independent(self, other: str) -> None:
        asked = np.arange(32_000, dtype=np.int32)
        first = uniforms(8, asked)
        second = uniforms(8, asked + 1) if other == "next position" else uniforms(9, asked)
        cells = (first * 8).astype(int) * 8 + (second * 8).astype(int)
        assert chi_square(np.bincount(cells, minlength=64), 500) < CHI_SQUARE_LIMIT[63]


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
    def test_filters_equal_naive_filters(self, sampling: SamplingConfig, vocab_size: int) -> None:
        logits = np.random.default_rng(vocab_size).normal(0, 2, (40, vocab_size))
        logits = logits.astype(np.float32)
        probs = filtered_probs(logits, sampling)
        probs /= probs.sum(-1, keepdims=True)
        expected = np.array([naive_probs(row, sampling) for row in logits.tolist()])
        np.testing.assert_array_equal(probs > 0, expected > 0)
        np.testing.assert_allclose(probs, expected, rtol=1e-12)

    def test_rows_do_not_touch_each_other(self) -> None:
        logits = np.random.default_rng(3).normal(0, 3, (30, 20)).astype(np.float32)
        together = filtered_probs(logits, FILTERS[-1])
        alone = np.concatenate([filtered_probs(row[None], FILTERS[-1]) for row in logits])
        np.testing.assert_array_equal(together, alone)

    def test_large_logits_do_not_overflow(self) -> None:
        logits = np.array([[3e38, -3e38, 3e38]], np.float32)
        probs = filtered_probs(logits, SamplingConfig(temperature=1))
        assert probs.tolist() == [[0.5, 0, 0.5]]

    def test_impossible_tokens_stay_impossible(self) -> None:
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
    def test_ties_stay_together(self, sampling: SamplingConfig, kept: list[int]) -> None:
        """Probabilities 8, 2, 1, 2, 2 of 15."""
        logits = np.log(np.array([[8, 2, 1, 2, 2]], np.float64)).astype(np.float32)
        assert np.flatnonzero(filtered_probs(logits, sampling)[0]).tolist() == kept

    @pytest.mark.parametrize("sampling", FILTERS, ids=str)
    def test_a_flat_row_keeps_every_token(self, sampling: SamplingConfig) -> None:
        assert (filtered_probs(np.zeros((1, 50), np.float32), sampling) > 0).all()


class TestChoose:
    @pytest.mark.parametrize("sampling", FILTERS, ids=str)
    def test_distribution(self, sampling: SamplingConfig) -> None:
        draws, logits = 20_000, np.array([1.5, 0, 2, -1, 0.5, 0.2, 1, -0.5, 1.8, 0.9, -0.2, 0.7])
        expected = draws * np.array(naive_probs(np.float32(logits).tolist(), sampling))
        numbers = uniforms(sampling.seed, np.arange(draws, dtype=np.int32))
        rows = np.broadcast_to(np.float32(logits), (draws, len(logits)))
        counts = np.bincount(choose(rows, sampling, numbers), minlength=len(logits))
        possible = expected > 0
        assert counts[~possible].sum() == 0
        rare = possible & (expected < 5)  # pooled, or chi-square is no fair measure
        common = possible & ~rare
        counts = np.append(counts[common], counts[rare].sum())
        expected = np.append(expected[common], max(expected[rare].sum(), 1e-9))
        assert chi_square(counts, expected) < CHI_SQUARE_LIMIT[11]

    def test_inverts_the_cumulative_distribution_in_token_order(self) -> None:
        logits = np.log(np.array([[1, 2, 1]], np.float64)).astype(np.float32)
        sampling = SamplingConfig(temperature=1)
        for number, token in [(0, 0), (0.24, 0), (0.26, 1), (0.74, 1), (0.76, 2), (1 - 2**-53, 2)]:
            assert choose(logits, sampling, np.array([number])).tolist() == [token]

    def test_edges_of_the_unit_interval_give_possible_tokens(self) -> None:
        logits = np.full((2, 9), -np.inf, np.float32)
        logits[:, [3, 4, 6]] = [0.1, 0.2, 0.3]
        tokens = choose(logits, SamplingConfig(temperature=1), np.array([0.0, 1 - 2**-53]))
        assert tokens.tolist() == [3, 6]

    def test_each_row_has_its_own_number(self) -> None:
        logits = np.zeros((4, 4), np.float32)
        numbers = np.array([0.9, 0.1, 0.6, 0.3])
        assert choose(logits, SamplingConfig(temperature=1), numbers).tolist() == [3, 0, 2, 1]

    def test_rows_together_equal_rows_alone(self) -> None:
        """A tree's node gets the token that plain decoding would get there."""
        rng = np.random.default_rng(4)
        logits, numbers = rng.normal(0, 2, (200, 50)).astype(np.float32), rng.random(200)
        for sampling in FILTERS:
            together = choose(logits, sampling, numbers)
            alone = [
                int(choose(logits[i : i + 1], sampling, numbers[i : i + 1])[0]) for i in range(200)
            ]
            assert together.tolist() == alone

    def test_greedy_takes_the_best_and_the_first_of_equals(self) -> None:
        logits = np.array([[0, 3, 1], [2, -1, 2], [-np.inf, -5, -np.inf]], np.float32)
        tokens = choose(logits, SamplingConfig())
        assert tokens.tolist() == [1, 0, 1]
        assert tokens.dtype == np.int32

    def test_greedy_ignores_filters_and_numbers(self) -> None:
        logits = np.array([[0, 3, 1]], np.float32)
        sampling = SamplingConfig(top_k=2, top_p=0.1, min_p=0.9, seed=4)
        assert choose(logits, sampling, np.array([0.99])).tolist() == [1]

    @pytest.mark.parametrize(
        "sampling", [SamplingConfig(), SamplingConfig(temperature=1, top_p=0.9)], ids=str
    )
    @pytest.mark.parametrize(
        "row",
        [
            [0, np.nan, 1],
            [np.nan, np.nan, np.nan],
            [0, np.inf, 1],
            [-np.inf, -np.inf, -np.inf],
        ],
        ids=str,
    )
    def test_rows_that_are_not_finite_raise(
        self, sampling: SamplingConfig, row: list[float]
    ) -> None:
        logits = np.array([[0, 1, 2], row, [0, 1, 2]], np.float32)
        with pytest.raises(NumericalError, match=r"not finite \(NaN or infinity\).*float32"):
            choose(logits, sampling, np.full(3, 0.5))


def test_top_p_keeps_no_token_beyond_the_mass_that_it_names() -> None:
    """Probabilities of exactly a half and two quarters: the first alone reaches one half."""
    sampling = SamplingConfig(temperature=1 / math.log(2), top_p=0.5)
    logits = np.array([[1, 0, 0]], np.float32)
    assert filtered_probs(logits, replace(sampling, top_p=1.0)).tolist() == [[0.5, 0.25, 0.25]]
    assert filtered_probs(logits, sampling).tolist() == [[0.5, 0, 0]]


@pytest.mark.parametrize("top_p", [1e-300, 1e-45, 1e-9])
def test_the_smallest_top_p_keeps_one_token(top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32)
    kept = filtered_probs(logits, SamplingConfig(temperature=1, top_p=top_p)) > 0
    assert kept.sum(-1).tolist() == [1] * 5
    np.testing.assert_array_equal(kept.argmax(-1), logits.argmax(-1))
