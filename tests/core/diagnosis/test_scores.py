"""Scores of the blocks along the target's own texts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from made_up_pairs import COMMON, DEPTHS, VOCAB, Head, MadeUp, token_at

from treeflash.diagnosis import Gain, depth_means, measure
from treeflash.errors import NumericalError, PromptError


def test_measure(folder):
    """Three blocks of one text: every fourth token is a root; the last has no token after it."""
    pair = MadeUp(folder, head=Head())
    answer = [token_at(position) for position in range(2, 12)]
    answer[4] = COMMON  # at depth 4 of the first block, the root of the second
    pair.draft = lambda roots, depths=None: [text.length for text, _ in roots]
    found = measure(pair, [([5], answer[:1]), ([5, 6], answer)], pair.head)
    np.testing.assert_array_equal(
        found.marginal.hits, [[1, 1, 1, 0, 1], [1, 1, 1, 1, 1], [1, np.nan, np.nan, np.nan, np.nan]]
    )
    assert found.marginal.log_probs[0, 0] == pytest.approx(math.log(0.7 + 0.3 / VOCAB))
    assert found.marginal.log_probs[0, 3] == pytest.approx(math.log(0.3 / VOCAB))
    assert found.earlier.hits[:, 0].tolist() == [0, 0, 0]
    assert np.isnan(found.later.hits[2]).all()
    assert found.later.hits[0].tolist() == [0, 0, 0, 0, 0]
    np.testing.assert_array_equal(pair.head.previous[:2], answer[8:])
    assert found.texts.tolist() == [1, 1, 1]
    by_text = found.text_means(2)
    assert np.isnan(by_text[0])
    assert by_text[1] == np.nanmean(found.marginal.log_probs)
    assert depth_means(found.marginal.hits) == [1, 1, 1, 0.5, 1]


def test_answers_too_short(folder):
    with pytest.raises(PromptError, match="too short to score"):
        measure(MadeUp(folder), [([5], [7])])


def test_a_drafter_that_is_not_a_number(folder):
    pair = MadeUp(folder)
    pair.log_probs = lambda block: np.full((DEPTHS, VOCAB), np.nan, np.float32)
    with pytest.raises(NumericalError, match="not a number"):
        measure(pair, [([5], [token_at(1), token_at(2)])])


def test_gain():
    base = np.array([[-1.0, -2.0], [-3.0, np.nan], [np.nan, np.nan]])
    gain = Gain.between(base, base + np.array([[0.5, 1.5], [3.0, 0.0], [9.0, 9.0]]))
    assert gain.nats == 2
    assert gain.error == 1
    assert str(gain) == "7.39x"
    assert not gain.is_clear(0.1)  # fewer than three standard errors
    assert Gain(2.0, 0.6).is_clear(2.0)
    assert not Gain(2.0, 0.6).is_clear(2.1)
    assert not Gain.between(base[:1], base[:1] + 5).is_clear(0.1)  # one block proves nothing
