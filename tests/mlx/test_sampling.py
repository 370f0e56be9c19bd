"""The sampler on MLX against the definition in NumPy."""

import numpy as np
import pytest
from random_params import random_params
from recordings import recording

from treeflash.config import SamplingConfig
from treeflash.decoding import sampling as definition
from treeflash.decoding.sampling import position_keys, vocabulary_noise
from treeflash.errors import NumericalError
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from treeflash_mlx import sampling
from treeflash_mlx.numerics import gumbel_on_device, logsumexp, top_indices, top_log_probs
from treeflash_mlx.sampling import sample, sample_tokens


def keys(count):
    return position_keys(3, np.arange(count, dtype=np.int32))


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
    chosen = sample_tokens(mx.array(logits), config, keys(300))
    np.testing.assert_array_equal(chosen, definition.sample_tokens(logits, config, keys(300)))
    assert chosen.dtype == np.int32


@pytest.mark.parametrize("vocab", [1, 5, 151_936])
def test_the_noise_of_a_gpu_is_as_defined(vocab):
    found = np.array(gumbel_on_device(mx.array(keys(9)), vocab))
    np.testing.assert_allclose(found, vocabulary_noise(keys(9), vocab), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6])
def test_extreme_temperatures(rng, temperature):
    logits = rng.normal(size=(50, 300)).astype(np.float32)
    config = SamplingConfig(temperature=temperature)
    chosen = sample_tokens(mx.array(logits), config, keys(50))
    np.testing.assert_array_equal(chosen, definition.sample_tokens(logits, config, keys(50)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(rng, bad, temperature):
    logits = rng.normal(size=(3, 40)).astype(np.float32)
    logits[1, 7] = bad
    with pytest.raises(NumericalError, match="not finite"):
        sample_tokens(mx.array(logits), SamplingConfig(temperature=temperature), keys(3))


def test_logits_of_minus_infinity_are_never_chosen(rng):
    logits = rng.normal(size=(2, 40)).astype(np.float32)
    logits[:, 5:] = -np.inf
    config = SamplingConfig(temperature=1.0)
    assert sample_tokens(mx.array(logits), config, keys(2)).max() < 5


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
    """It is 0 in float32; the most probable token stays, whatever the noise."""
    logits = rng.normal(0, 2, (20, 1000)).astype(np.float32)
    config = SamplingConfig(temperature=1.0, top_p=1e-300)
    chosen = sample_tokens(mx.array(logits), config, keys(20))
    np.testing.assert_array_equal(chosen, logits.argmax(-1))


def test_a_gpu_takes_one_kernel_for_the_normaliser(rng, see_device):
    """A CPU adds in blocks, because its own sums are too inexact."""
    x = mx.array(rng.normal(size=(3, 5000)), mx.float32)
    on_cpu = logsumexp(x)
    see_device(mx.gpu)
    with recording(mx, "logsumexp") as calls:
        assert mx.allclose(logsumexp(x), on_cpu, atol=1e-3)
    assert len(calls) == 1


@pytest.mark.parametrize("vocab", [5, 65, 320])
def test_tokens_and_log_probs_of_several_sequences_are_those_defined(rng, vocab):
    reported = edited = 0
    for _ in range(25):
        counts = [int(n) for n in rng.integers(0, 5, 4)]
        params = [random_params(rng, n, vocab) if n else None for n in counts]
        parts = [(2 * rng.normal(size=(n, vocab))).astype(np.float32) for n in counts]
        arrays = [mx.array(part) if len(part) else None for part in parts]
        for part, given, found in zip(parts, params, sample(arrays, params), strict=True):
            assert (found is None) == (given is None)
            if given is None:
                continue
            expected = definition.sample(part, given)
            assert found.tokens.tolist() == expected.tokens.tolist()
            assert (found.log_probs is None) == (given.log_probs is None)
            if found.log_probs is None:
                continue
            reported += 1
            edited += given.edits is not None or given.allowed is not None
            mine, theirs = found.log_probs, expected.log_probs
            np.testing.assert_array_equal(mine.tokens, theirs.tokens)
            np.testing.assert_allclose(mine.sampled, theirs.sampled, atol=1e-4)
            np.testing.assert_allclose(mine.values, theirs.values, atol=1e-4)
    assert reported > edited > 5


def test_a_row_is_drawn_again_without_its_neighbours(rng):
    """Other rows are certain; sums over the whole vocabulary may round differently."""
    logits = mx.array(rng.normal(size=(3, 700)) * [[3.0], [0.01], [3.0]], mx.float32)
    config = SamplingConfig(temperature=1.0, top_p=0.9)
    with recording(sampling, "_sample") as drawn:
        together = sample_tokens(logits, config, keys(3))
    assert [(len(args[0]), args[-1]) for args in drawn] == [(3, sampling.SHORTLIST), (1, 700)]
    alone = [sample_tokens(logits[i : i + 1], config, keys(3)[i : i + 1])[0] for i in range(3)]
    assert together.tolist() == alone


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("scale", [0.02, 0.3, 3.0])
def test_the_edge_of_a_nucleus(rng, top_p, scale):
    """In flat distributions it lies far down, beyond the shortlist."""
    logits = (scale * rng.normal(size=(100, 700))).astype(np.float32)
    keys = position_keys(3, np.arange(100, dtype=np.int32))
    config = SamplingConfig(temperature=1.0, top_p=top_p)
    found = sample_tokens(mx.array(logits), config, keys)
    assert found.tolist() == definition.sample_tokens(logits, config, keys).tolist()
