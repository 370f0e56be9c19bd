import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding import sampling as definition
from treeflash.errors import NumericalError
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx  # noqa: E402
from treeflash_mlx.sampler import _filter, _invert, choose  # noqa: E402
from treeflash_mlx.topk import top_indices, top_log_probs  # noqa: E402

SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.05},
    "flat": {"temperature": 3.0, "top_p": 0.97},
    "all": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
}


@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS)
def test_choices_follow_the_definition(rng, options):
    config = SamplingConfig(**{"temperature": 1.0, **options})
    logits = rng.normal(0, 2, (300, 501)).astype(np.float32)
    logits[:, ::3] = logits[:, :1]  # ties, at the edge of some filters
    uniforms = rng.random(300)
    uniforms[:3] = 0.0, np.nextafter(1.0, 0), 0.5
    chosen = choose(mx.array(logits), config, uniforms)
    np.testing.assert_array_equal(chosen, definition.choose(logits, config, uniforms))
    assert chosen.dtype == np.int32


def test_a_uniform_number_next_to_one_chooses_a_kept_token_in_float32(rng):
    """It is 1 in float32, and no cumulative mass exceeds the total."""
    logits = rng.normal(0, 2, (50, 1000)).astype(np.float32)
    config = SamplingConfig(temperature=1.0, top_k=5)
    probs, _ = _filter(mx.softmax(mx.array(logits), axis=-1), config, 256)
    ones = mx.full((50, 1), np.nextafter(1.0, 0), mx.float32)
    assert ones[0, 0].item() == 1
    chosen = np.array(_invert(probs, ones))
    last = [np.flatnonzero(row)[-1] for row in np.array(probs)]
    np.testing.assert_array_equal(chosen, last)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(rng, bad, temperature):
    logits = rng.normal(size=(3, 40)).astype(np.float32)
    logits[1, 7] = bad
    with pytest.raises(NumericalError, match="not finite"):
        choose(mx.array(logits), SamplingConfig(temperature=temperature), np.full(3, 0.5))


def test_logits_of_minus_infinity_are_never_chosen(rng):
    logits = rng.normal(size=(2, 40)).astype(np.float32)
    logits[:, 5:] = -np.inf
    config = SamplingConfig(temperature=1.0)
    assert choose(mx.array(logits), config, np.array([0.1, 0.99])).max() < 5


@pytest.mark.parametrize("vocab", [5, 129, 2048, 5000])
@pytest.mark.parametrize("k", [1, 5])
def test_top_indices_equal_sorting(rng, vocab, k):
    logits = rng.normal(size=(30, vocab)).astype(np.float32)
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(np.array(top_indices(mx.array(logits), k)), expected)
    tokens, log_probs = top_log_probs(mx.array(logits), k, 0.7)
    scaled = logits / 0.7
    normalised = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    np.testing.assert_array_equal(np.array(tokens), expected)
    expected_log_probs = np.take_along_axis(normalised, expected, -1)
    np.testing.assert_allclose(np.array(log_probs), expected_log_probs, atol=1e-5)


def test_equal_entries_are_in_order_of_their_columns():
    logits = np.zeros((2, 3000), np.float32)
    logits[:, [2900, 7, 1500]] = 1
    np.testing.assert_array_equal(np.array(top_indices(mx.array(logits), 3)), [[7, 1500, 2900]] * 2)


def test_a_top_p_next_to_zero_keeps_one_token(rng):
    """It is 0 in float32; the most probable token stays, whatever the number."""
    logits = rng.normal(0, 2, (20, 1000)).astype(np.float32)
    config = SamplingConfig(temperature=1.0, top_p=1e-300)
    chosen = choose(mx.array(logits), config, rng.random(20))
    np.testing.assert_array_equal(chosen, logits.argmax(-1))
    probs, covered = _filter(mx.softmax(mx.array(logits), axis=-1), config, 256)
    assert covered.item()
    np.testing.assert_array_equal((np.array(probs) > 0).sum(-1), 1)
