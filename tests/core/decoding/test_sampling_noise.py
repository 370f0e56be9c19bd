"""The noise of sampling: its keys, its distribution, and that it never changes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import Noise, gumbel, position_keys, vocabulary_noise

SEEDS = [0, 1, 2, 12345, 2**32, 2**63, 2**64 - 1]
# At positions 0, 1, 7 and 4095.
KEYS_OF_SEED_0 = [
    [149215387, 49592932],
    [2628306354, 1037445899],
    [1738823612, 4235122279],
    [1396331794, 1783157696],
]
KEYS_OF_LAST_SEED = [
    [2380159995, 1009066437],
    [2920482519, 3080826205],
    [4000967216, 1314990446],
    [2150454326, 117681275],
]
# Of seed 0 at position 7.
NOISE_OF_TOKENS = {0: 0.523037, 1: -0.157901, 2: 2.00573, 151935: 1.584003}
# Exceeded with probability 0.001, by degrees of freedom.
CHI_SQUARE_LIMIT = {15: 37.70, 63: 103.44}


def positions(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def tokens(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def chi_square(counts: np.ndarray, expected: float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def quantiles(noise: np.ndarray) -> np.ndarray:
    """The share of the standard Gumbel distribution below each number: uniform if it is that."""
    return np.exp(-np.exp(-noise.astype(np.float64)))


class TestPositionKeys:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_key_depends_on_seed_and_position_alone(self, seed):
        """Whatever else is asked for, in whatever order, however often."""
        stream = position_keys(seed, tokens(300))
        for position in range(300):
            np.testing.assert_array_equal(
                position_keys(seed, positions(position))[0], stream[position]
            )
        rng = np.random.default_rng(0)
        for size in (1, 2, 5, 64, 500):
            asked = rng.integers(0, 300, size).astype(np.int32)
            np.testing.assert_array_equal(position_keys(seed, asked), stream[asked])

    @pytest.mark.parametrize("seed", SEEDS)
    def test_keys_are_the_documented_stream(self, seed):
        low, high = position_keys(seed, tokens(100)).T.tolist()
        stream = np.random.Philox(key=seed).random_raw(100).tolist()
        assert [a + (b << 32) for a, b in zip(low, high, strict=True)] == stream

    def test_keys_never_change(self):
        """A seed quoted in a bug report must give the same sequence for ever."""
        asked = positions(0, 1, 7, 4095)
        assert position_keys(0, asked).tolist() == KEYS_OF_SEED_0
        assert position_keys(2**64 - 1, asked).tolist() == KEYS_OF_LAST_SEED

    def test_nodes_of_one_depth_share_a_key(self):
        first, second, third = position_keys(5, positions(9, 9, 10)).tolist()
        assert first == second != third

    def test_far_positions_are_cheap(self):
        """Reached in one step: a stream up to there would take 16 GB."""
        last = 2**31 - 1
        pair = position_keys(3, positions(last - 1, last)).tolist()
        assert pair[1] == position_keys(3, positions(last)).tolist()[0] != pair[0]

    def test_every_bit_of_the_seed_counts(self):
        seeds = [0] + [1 << bit for bit in range(64)]
        found = {tuple(position_keys(seed, positions(17))[0].tolist()) for seed in seeds}
        assert len(found) == len(seeds)


class TestGumbel:
    def test_noise_never_changes(self):
        keys = position_keys(0, positions(7))
        noise = gumbel(keys, np.array(list(NOISE_OF_TOKENS), np.int32))
        np.testing.assert_allclose(noise[0], list(NOISE_OF_TOKENS.values()), atol=1e-6)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_distribution_over_tokens(self, seed):
        shares = quantiles(gumbel(position_keys(seed, positions(3)), tokens(50_000)))
        counts = np.bincount((shares[0] * 16).astype(int), minlength=16)
        assert chi_square(counts, 50_000 / 16) < CHI_SQUARE_LIMIT[15]

    @pytest.mark.parametrize("token", [0, 1, 2, 49_151, 2**31 - 1])
    def test_distribution_over_positions(self, token):
        noise = gumbel(position_keys(4, tokens(32_000)), np.array([token], np.int32))
        counts = np.bincount((quantiles(noise[:, 0]) * 16).astype(int), minlength=16)
        assert chi_square(counts, 2000) < CHI_SQUARE_LIMIT[15]

    @pytest.mark.parametrize("other", ["next token", "next position", "next seed", "halves"])
    def test_neighbours_are_independent(self, other):
        keys = position_keys(8, positions(5))
        others = {
            "next position": position_keys(8, positions(6)),
            "next seed": position_keys(9, positions(5)),
            "halves": keys[:, ::-1],
        }
        first = gumbel(keys, tokens(64_000))[0]
        second = gumbel(others.get(other, keys), tokens(64_000) + (other == "next token"))[0]
        cells = (quantiles(first) * 8).astype(int) * 8 + (quantiles(second) * 8).astype(int)
        assert chi_square(np.bincount(cells, minlength=64), 1000) < CHI_SQUARE_LIMIT[63]

    def test_rare_tokens_win_as_often_as_they_should(self):
        """The noise that lets an improbable token win is precise: one in 2000 here."""
        keys = position_keys(6, tokens(40_000))
        logits = np.full(251, math.log(1 / 2000 / 250))
        logits[0] = math.log(1 - 1 / 2000)
        wins = ((logits + gumbel(keys, tokens(251))).argmax(-1) > 0).sum()
        assert abs(wins - 20) < 4 * math.sqrt(20)

    def test_noise_is_finite(self):
        """For all 2**31 shares: the smallest and the largest are the ends."""
        noise = gumbel(position_keys(1, tokens(300)), tokens(20_000))
        assert noise.dtype == np.float32
        assert np.isfinite(noise).all()
        assert -math.log(17) < noise.min() < noise.max() < math.log(2**32)

    def test_tokens_of_each_row(self):
        keys, rng = position_keys(2, tokens(3)), np.random.default_rng(0)
        own = rng.integers(0, 500, (3, 20)).astype(np.int32)
        whole = vocabulary_noise(keys, 500)
        np.testing.assert_array_equal(gumbel(keys, own), np.take_along_axis(whole, own, 1))

    def test_kept_rows_cannot_be_changed_by_a_caller(self):
        keys = position_keys(2, tokens(3))
        vocabulary_noise(keys, 50)[:] = 0
        np.testing.assert_array_equal(vocabulary_noise(keys, 50), gumbel(keys, tokens(50)))


class TestNoise:
    def test_noise_of_several_texts_and_its_parts(self):
        cold, hot = SamplingConfig(temperature=0.5, seed=1), SamplingConfig(temperature=2, seed=9)
        sequences = [(cold, positions(3, 4)), (hot, positions(7, 8))]
        for part, (sampling, where) in zip(
            Noise.from_positions(sequences).split(2), sequences, strict=True
        ):
            noise = gumbel(position_keys(sampling.seed, where), tokens(30))
            expected = np.float32(sampling.temperature) * noise
            np.testing.assert_array_equal(part.values(tokens(30)), expected)

    def test_a_greedy_text_beside_others_has_none(self):
        sequences = [
            (SamplingConfig(temperature=1), positions(3)),
            (SamplingConfig(), positions(8)),
        ]
        sampled, greedy = Noise.from_positions(sequences).values(tokens(30))
        assert (sampled != 0).all()
        assert (greedy == 0).all()
