"""How the sampler on MLX computes; `conformance/test_sampling.py` has what it draws."""

import numpy as np
import pytest
from recordings import recording

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import position_keys
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from treeflash_mlx import sampling
from treeflash_mlx.numerics import logsumexp, top_indices, top_log_probs
from treeflash_mlx.sampling import sample_tokens


def keys(count):
    return position_keys(3, np.arange(count, dtype=np.int32))


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


def test_a_gpu_takes_one_kernel_for_the_normaliser(rng, see_device):
    """A CPU adds in blocks, because its own sums are too inexact."""
    x = mx.array(rng.normal(size=(3, 5000)), mx.float32)
    on_cpu = logsumexp(x)
    see_device(mx.gpu)
    with recording(mx, "logsumexp") as calls:
        assert mx.allclose(logsumexp(x), on_cpu, atol=1e-3)
    assert len(calls) == 1


def test_a_row_is_drawn_again_without_its_neighbours(rng):
    """Other rows are certain; sums over the whole vocabulary may round differently."""
    logits = mx.array(rng.normal(size=(3, 700)) * [[3.0], [0.01], [3.0]], mx.float32)
    config = SamplingConfig(temperature=1.0, top_p=0.9)
    with recording(sampling, "_sample") as drawn:
        together = sample_tokens(logits, config, keys(3))
    assert [(len(args[0]), args[-1]) for args in drawn] == [(3, sampling.SHORTLIST), (1, 700)]
    alone = [sample_tokens(logits[i : i + 1], config, keys(3)[i : i + 1])[0] for i in range(3)]
    assert together.tolist() == alone
