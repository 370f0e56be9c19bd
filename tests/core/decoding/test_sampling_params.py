"""Edits, masks and log probabilities against slow loops."""

from __future__ import annotations

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import (
    LogitEdits,
    SamplingParams,
    only,
    position_keys,
    sample,
    unpack,
)
from treeflash.errors import NumericalError
from treeflash.reference.numerics import log_softmax
from treeflash.testing.pairs import SAMPLINGS

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


def test_edits(rng, logits):
    before, edits = logits.copy(), random_edits(rng)
    np.testing.assert_array_equal(edits.apply(logits), edited_slowly(logits, edits))
    np.testing.assert_array_equal(logits, before)


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


@pytest.mark.parametrize("count", [0, 3, VOCAB + 1])
def test_log_probs_are_those_of_the_target_alone(rng, logits, count):
    """Whatever the edits, the mask and the temperature."""
    logits[:, 7] = logits[:, 5]  # ties are in the order of token ids
    allowed = rng.random((ROWS, VOCAB)) < 0.5
    choice = SamplingParams(
        SAMPLED,
        position_keys(1, np.arange(ROWS, dtype=np.int32)),
        random_edits(rng),
        pack(allowed),
        count,
    )
    found = sample(logits, choice)
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
        bits = np.ones((n, 96), np.bool_)
        bits[np.arange(n), best] = False
        allowed = np.packbits(bits, -1, bitorder="little").view(np.uint32)
    keys = None if sampling.greedy else position_keys(1, np.arange(n, dtype=np.int32))
    found = sample(logits, SamplingParams(sampling, keys, edits, allowed, 3))
    expected = log_softmax(logits.astype(np.float64))
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
