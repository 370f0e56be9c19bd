"""Sampling: filters and choices, noise that never changes, and edits and penalties of logits."""

import math

import numpy as np
import pytest

from treeflash.config import Penalties, SamplingConfig
from treeflash.decoding.sampling import (
    LogitEdits,
    Noise,
    PenaltyState,
    SamplingParams,
    filtered_probs,
    gumbel,
    noisy_logits,
    only,
    position_keys,
    sample,
    sample_tokens,
    unpack,
    vocabulary_noise,
)
from treeflash.decoding.tree import DraftTree
from treeflash.errors import NumericalError
from treeflash.testing.comparisons import path_to, random_tokens, random_tree
from treeflash.testing.pairs import SAMPLINGS

# Exceeded with probability 0.001, by degrees of freedom.
CHI_SQUARE_LIMIT = {15: 37.70, 63: 103.44}


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

# Probabilities of logits 1 and 0 are one half and one quarter.
HALF = SamplingConfig(temperature=1 / math.log(2), top_p=0.5)


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

    @pytest.mark.parametrize(
        ("logits", "sampling", "expected"),
        [
            pytest.param(
                [3e38, -3e38, 3e38], SamplingConfig(temperature=1), [0.5, 0, 0.5], id="large"
            ),
            pytest.param(
                [0, -np.inf, 0], SamplingConfig(temperature=9), [0.5, 0, 0.5], id="impossible"
            ),
            # It is lost to rounding in the sum of the others.
            pytest.param([1, -90], SamplingConfig(temperature=1), [1, 3e-40], id="improbable"),
            # Of probabilities of exactly a half and two quarters, the first alone reaches one half.
            pytest.param([1, 0, 0], HALF, [0.5, 0, 0], id="all of the mass that top_p names"),
        ],
    )
    def test_filters_by_hand(self, logits, sampling, expected):
        (probs,) = filtered_probs(np.array([logits], np.float32), sampling)
        assert ((probs > 0) == (np.array(expected) > 0)).all()
        np.testing.assert_allclose(probs, expected, atol=1e-15)

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


class TestChoose:
    def test_takes_the_largest_sum_of_logit_and_noise(self):
        """The noise of a colder temperature is smaller."""
        logits = np.random.default_rng(1).normal(size=(40, 30)).astype(np.float32)
        noise = gumbel(keys(40), np.arange(30, dtype=np.int32))
        for temperature in (0.3, 1.0, 2.0):
            chosen = sample_tokens(logits, SamplingConfig(temperature=temperature), keys(40))
            assert chosen.tolist() == (logits + temperature * noise).argmax(-1).tolist()

    @pytest.mark.parametrize("sampling", FILTERS, ids=str)
    def test_noise_is_added_to_the_tokens_that_filters_keep(self, sampling):
        logits = np.random.default_rng(2).normal(0, 2, (50, 40)).astype(np.float32)
        kept = filtered_probs(logits, sampling) > 0
        noisy = noisy_logits(logits, sampling, keys(50))
        np.testing.assert_array_equal(np.isfinite(noisy), kept)
        noise = gumbel(keys(50), np.arange(40, dtype=np.int32))
        expected = logits + sampling.temperature * noise
        np.testing.assert_allclose(noisy[kept], expected[kept], rtol=1e-6, atol=1e-6)

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


SEEDS = [0, 1, 2, 12345, 2**32, 2**63, 2**64 - 1]

# Of seed 0 at position 7.
NOISE_OF_TOKENS = {0: 0.523037, 1: -0.157901, 2: 2.00573, 151935: 1.584003}


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

    def test_far_positions_are_cheap(self):
        """Reached in one step: a stream up to there would take 16 GB."""
        last = 2**31 - 1
        pair = position_keys(3, positions(last - 1, last)).tolist()
        assert pair[1] == position_keys(3, positions(last)).tolist()[0] != pair[0]


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

    def test_noise_is_finite(self):
        """For all 2**31 shares: the smallest and the largest are the ends."""
        noise = gumbel(position_keys(1, tokens(300)), tokens(20_000))
        assert noise.dtype == np.float32
        assert np.isfinite(noise).all()
        assert -math.log(17) < noise.min() < noise.max() < math.log(2**32)
        # The noise that lets an improbable token win is precise.
        expected = noise.size * -math.expm1(-math.exp(-12))
        assert abs((noise > 12).sum() - expected) < 4 * math.sqrt(expected)

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


ROWS, VOCAB = 5, 70  # of three words of a bitmask, the last not full

SAMPLED = SamplingConfig(temperature=0.8, top_p=0.9)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def logits(rng):
    return rng.normal(0, 2, (ROWS, VOCAB)).astype(np.float32)


def pack(allowed):
    """A bitmask, bit by bit."""
    words = np.zeros((len(allowed), -(-allowed.shape[1] // 32)), np.uint32)
    for row, token in zip(*np.nonzero(allowed), strict=True):
        words[row, token // 32] |= np.uint32(1 << (token % 32))
    return words


def random_edits(rng):
    cells = rng.choice(ROWS * VOCAB, 60, replace=False)
    factors = rng.uniform(0.5, 2, 60).astype(np.float32)
    additions = rng.normal(0, 3, 60).astype(np.float32)
    return LogitEdits(cells // VOCAB, cells % VOCAB, factors, additions)


def edited_slowly(logits, edits):
    edited = logits.copy()
    for row, token, factor, addition in zip(
        edits.rows, edits.tokens, edits.factors, edits.additions, strict=True
    ):
        x = edited[row, token]
        edited[row, token] = (x / factor if x > 0 else x * factor) + addition
    return edited


def test_bitmasks(rng):
    allowed = rng.random((ROWS, VOCAB)) < 0.3
    np.testing.assert_array_equal(unpack(pack(allowed), VOCAB), allowed)


def test_bitmasks_of_one_token():
    tokens = np.arange(VOCAB, dtype=np.int32)
    np.testing.assert_array_equal(unpack(only(tokens, VOCAB), VOCAB), np.eye(VOCAB, dtype=bool))


@pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLED], ids=["greedy", "sampled"])
def test_masks_take_effect_after_edits(rng, logits, sampling):
    edits, allowed = random_edits(rng), rng.random((ROWS, VOCAB)) < 0.1
    keys = None if sampling.greedy else position_keys(0, np.arange(ROWS, dtype=np.int32))
    slow = edited_slowly(logits, edits)
    slow[~allowed] = -np.inf
    found = sample(logits, SamplingParams(sampling, keys, edits, pack(allowed)))
    np.testing.assert_array_equal(found.tokens, sample(slow, SamplingParams(sampling, keys)).tokens)
    assert allowed[np.arange(ROWS), found.tokens].all()
    assert found.log_probs is None


def test_a_row_without_an_allowed_token_is_an_error(logits):
    allowed = np.zeros((ROWS, VOCAB), np.bool_)
    with pytest.raises(NumericalError, match="not finite"):
        sample(logits, SamplingParams(allowed=pack(allowed)))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("count", [0, 3, VOCAB + 1])
def test_log_probs_are_those_of_the_target_alone(rng, logits, count, sampling):
    """Whatever the edits, the mask, the temperature and the filters."""
    logits[:, 7] = logits[:, 5]  # ties are in the order of token ids
    allowed = rng.random((ROWS, VOCAB)) < 0.5
    keys = None if sampling.greedy else position_keys(1, np.arange(ROWS, dtype=np.int32))
    params = SamplingParams(sampling, keys, random_edits(rng), pack(allowed), count)
    found = sample(logits, params)
    for row in range(ROWS):
        exact = logits[row].astype(np.float64)
        exact -= np.log(sum(np.exp(x) for x in exact))
        best = sorted(range(VOCAB), key=lambda token, x=exact: (-x[token], token))[:count]
        assert found.log_probs.tokens[row].tolist() == best
        np.testing.assert_allclose(found.log_probs.values[row], exact[best], atol=1e-5)
        assert found.log_probs.sampled[row] == pytest.approx(exact[found.tokens[row]], abs=1e-5)
    some = found.log_probs.rows(np.array([0, 3], np.int32))
    np.testing.assert_array_equal(some.tokens, found.log_probs.tokens[[0, 3]])
    np.testing.assert_array_equal(some.sampled, found.log_probs.sampled[[0, 3]])


FEW = 12

PENALTIES = {
    "repetition": Penalties(repetition=1.3),
    "reward": Penalties(repetition=0.7),
    "presence": Penalties(presence=0.8),
    "frequency": Penalties(frequency=-0.4),
    "bias": Penalties(logit_bias=((3, 2.5), (11, -100.0))),
    "all": Penalties(repetition=1.2, presence=0.5, frequency=0.3, logit_bias=((5, 1.0),)),
}


def penalised(logits, penalties, prompt, generated):
    """One row of logits, after counting a sequence token by token."""
    row = logits.astype(np.float64)
    for token in range(len(row)):
        count = generated.count(token)
        if count or token in prompt:
            row[token] = (
                row[token] / penalties.repetition
                if row[token] > 0
                else row[token] * penalties.repetition
            )
        row[token] += dict(penalties.logit_bias).get(token, 0.0)
        row[token] -= penalties.presence * (count > 0) + penalties.frequency * count
    return row


@pytest.mark.parametrize("penalties", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("nodes", [1, 2, 30])
def test_each_node_counts_its_own_path(penalties, nodes):
    rng = np.random.default_rng(nodes)
    prompt, generated = random_tokens(rng, FEW, 3), random_tokens(rng, FEW, 6)
    state = PenaltyState(penalties, prompt)
    state.add(generated[:2])
    state.add(generated[2:])
    tree = random_tree(rng, generated[-1], nodes, FEW)
    logits = rng.normal(0, 2, (nodes, FEW)).astype(np.float32)
    found = state.edits(tree).apply(logits)
    for node in range(nodes):
        below = tree.tokens[path_to(tree, node)[1:]].tolist()
        expected = penalised(logits[node], penalties, prompt, generated + below)
        np.testing.assert_allclose(found[node], expected, atol=1e-5)


def test_no_penalty_changes_nothing():
    assert PenaltyState(Penalties(), [1, 2]).edits(DraftTree.root_only(2)) is None
