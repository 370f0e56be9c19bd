"""What is sampled and reported for several sequences is what the core defines."""

from __future__ import annotations

import numpy as np
import pytest
from random_params import random_params

from treeflash.config import SamplingConfig
from treeflash.decoding import sampling as core
from treeflash.decoding.sampling import position_keys
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from treeflash_mlx.sampling import sample, sample_tokens


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
            expected = core.sample(part, given)
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


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("scale", [0.02, 0.3, 3.0])
def test_the_edge_of_a_nucleus(rng, top_p, scale):
    """In flat distributions it lies far down, beyond the shortlist."""
    logits = (scale * rng.normal(size=(100, 700))).astype(np.float32)
    keys = position_keys(3, np.arange(100, dtype=np.int32))
    config = SamplingConfig(temperature=1.0, top_p=top_p)
    found = sample_tokens(mx.array(logits), config, keys)
    assert found.tolist() == core.sample_tokens(logits, config, keys).tolist()
