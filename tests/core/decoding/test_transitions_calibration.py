"""Calibration: it finds the temperature that a drafter lacks, and leaves a good one alone."""

from __future__ import annotations

import numpy as np
import pytest
from random_tables import KINDS, random_table

from treeflash.decoding.transitions import EXPONENTS, MIN_REST, Calibration, TransitionTable
from treeflash.reference.numerics import log_softmax

VOCAB, CHILDREN, DEPTHS = 60, 16, 6


def observed(exponent, iterations=150, seed=0):
    """What is learned about a drafter whose probabilities are to be raised to that exponent."""
    rng = np.random.default_rng(seed)
    calibration = Calibration(VOCAB)
    for _ in range(iterations):
        target = log_softmax(rng.normal(0, 3, (DEPTHS, VOCAB)))
        drafted = log_softmax(target / exponent)
        best = np.argsort(-drafted)[:, :CHILDREN].astype(np.int32)
        table = TransitionTable.from_marginals(
            best, np.take_along_axis(drafted, best, 1).astype(np.float32)
        )
        tokens = [int(rng.choice(VOCAB, p=np.exp(row))) for row in target]
        calibration.observe(table, tokens)
    return calibration


def sure(exponent):
    """A calibration that believes in one exponent."""
    return Calibration(VOCAB, np.where(exponent == EXPONENTS, 0.0, -np.inf))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("exponent", [0.6, 1, 1.6, 2.5])
def test_it_finds_the_exponent(exponent, seed):
    assert observed(exponent, seed=seed).exponent == pytest.approx(exponent, rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_little_evidence_changes_little(seed):
    assert observed(1, iterations=3, seed=seed).exponent == pytest.approx(1, abs=0.25)


def test_a_chain_of_improbable_tokens_is_learned_quickly():
    """A drafter that is always right and never sure: two blocks are enough to sharpen it."""
    tokens = np.tile(np.arange(CHILDREN, dtype=np.int32), (DEPTHS, 1))
    log_probs = log_softmax(np.r_[2.0, np.zeros(VOCAB - 1)])[:CHILDREN].astype(np.float32)
    table = TransitionTable.from_marginals(tokens, np.tile(log_probs, (DEPTHS, 1)))
    calibration = Calibration(VOCAB)
    for _ in range(2):
        calibration.observe(table, [0] * DEPTHS)
    assert calibration.exponent > 1.5
    calibrated = calibration.correct(table).log_probs[:, 0, 0]
    assert (calibrated > table.log_probs[:, 0, 0] + 0.3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_without_evidence_probabilities_stay(kind):
    table = random_table(kind, (7, 5, 4), 0)
    calibration = Calibration(VOCAB)
    assert calibration.exponent == 1
    rest = 1 - np.exp(table.log_probs.astype(np.float64)).sum(-1)
    kept = rest > MIN_REST  # not where a random table's children have more than everything
    np.testing.assert_allclose(
        calibration.correct(table).log_probs[kept], table.log_probs[kept], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_stay_distributions_in_the_same_order(kind):
    table = random_table(kind, (7, 5, 4), 1)
    for exponent in EXPONENTS:
        found = sure(exponent).correct(table)
        np.testing.assert_array_equal(np.isfinite(found.log_probs), np.isfinite(table.log_probs))
        with np.errstate(invalid="ignore"):
            assert not (np.diff(found.log_probs, axis=-1) > 0).any()
        assert (np.exp(found.log_probs).sum(-1) <= 1 + 1e-6).all()
        np.testing.assert_array_equal(found.tokens, table.tokens)
        np.testing.assert_array_equal(found.next_row, table.next_row)


def test_the_rest_is_raised_as_well():
    """Rows whose other tokens are as probable as the last child are raised exactly."""
    logits = np.r_[5.0, 4.0, 3.0, np.zeros(VOCAB - 3)]
    tokens = np.arange(4, dtype=np.int32)[None]
    table = TransitionTable.from_marginals(tokens, log_softmax(logits)[None, :4].astype(np.float32))
    for exponent in EXPONENTS:
        np.testing.assert_allclose(
            sure(exponent).correct(table).log_probs[0, 0], log_softmax(exponent * logits)[:4], 1e-4
        )


def test_rows_are_followed_as_far_as_they_are_known():
    """At depth 2 the row of the chosen token counts, and no other; without a row it ends."""
    rows = log_softmax(np.array([[[3.0, 0, 0, 0]] * 2, [[0.5, 0, 0, 0], [6.0, 0, 0, 0]]]))
    tokens = np.tile(np.arange(4, dtype=np.int32), (2, 2, 1))
    next_row = np.full((2, 2, 4), -1, np.int32)
    next_row[0, :, 1] = 1
    table = TransitionTable(tokens[..., :3], rows[..., :3].astype(np.float32), next_row[..., :3])

    def weights(*tokens):
        calibration = Calibration(4)
        before = calibration.log_weights
        calibration.observe(table, tokens)
        return calibration.log_weights - before

    def raised(row, token):
        return log_softmax(EXPONENTS[:, None] * row)[:, token]

    first = raised(rows[0, 0], 1)
    np.testing.assert_allclose(weights(1, 0), first + raised(rows[1, 1], 0), 1e-4)
    np.testing.assert_allclose(weights(0, 0), raised(rows[0, 0], 0), 1e-4)
    np.testing.assert_allclose(weights(1, 3, 0), first + raised(rows[1, 1], 3), 1e-4)
    np.testing.assert_allclose(weights(3, 0), raised(rows[0, 0], 3), 1e-4)


def test_an_empty_row_says_nothing():
    table = random_table("smooth", (1, 1, 4), 0)
    empty = TransitionTable(table.tokens, np.full((1, 1, 4), -np.inf, np.float32), table.next_row)
    calibration = Calibration(VOCAB)
    calibration.observe(empty, [0])
    assert calibration.exponent == 1
    np.testing.assert_array_equal(calibration.correct(empty).log_probs, empty.log_probs)
