"""The choices of several texts against the definition in the core."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_params import random_params

from treeflash.decoding import sampling as core
from treeflash.decoding.sampling import LogitEdits, SamplingParams
from treeflash.errors import NumericalError
from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda import operations
from treeflash_cuda import sampling as sampling_module
from treeflash_cuda.sampling import Logits

REPEATED = settings(max_examples=40)


def sample(logits, counts, all_params, sample_rows=None):
    return sampling_module.sample(Logits.split(logits, counts), all_params, sample_rows)


@pytest.mark.parametrize("sample_rows", [None, operations.sample_rows], ids=["cpu", "gpu"])
def test_choices_of_several_texts_are_those_defined(sample_rows):
    @REPEATED
    @given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([5, 32, 65, 320]))
    def check(seed, texts, vocab):
        rng = np.random.default_rng(seed)
        counts = [int(n) for n in rng.integers(0, 6, texts)]
        wanted = [random_params(rng, n, vocab) if n else None for n in counts]
        logits = rng.normal(size=(sum(counts), vocab)).astype(np.float32) * 2
        ours = torch.from_numpy(logits.copy())
        found = sample(ours, counts, wanted, sample_rows)
        np.testing.assert_array_equal(ours, logits)  # they are not edited in place
        parts = np.split(logits, np.cumsum(counts)[:-1])
        for sampled, params, part in zip(found, wanted, parts, strict=True):
            assert (sampled is None) == (params is None)
            if params is not None:
                check_one(sampled, core.sample(part, params))

    check()


def check_one(sampled, expected):
    np.testing.assert_array_equal(sampled.tokens, expected.tokens, strict=True)
    assert (sampled.log_probs is None) == (expected.log_probs is None)
    if expected.log_probs is None:
        return
    mine, theirs = sampled.log_probs, expected.log_probs
    np.testing.assert_array_equal(mine.tokens, theirs.tokens, strict=True)
    np.testing.assert_allclose(mine.sampled, theirs.sampled, atol=1e-5, strict=True)
    np.testing.assert_allclose(mine.values, theirs.values, atol=1e-5, strict=True)


def test_equal_choices_need_no_copy_of_the_logits(monkeypatch):
    seen = []
    monkeypatch.setattr(
        sampling_module, "sample_tokens", lambda rows, *_: seen.append(rows) or np.zeros(5)
    )
    logits = torch.zeros(5, 40)
    sample(logits, [2, 0, 3], [SamplingParams(), None, SamplingParams()])
    assert seen[0].data_ptr() == logits.data_ptr()


def test_edits_of_half_precision_are_made_in_single_precision():
    logits = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    bias = np.array([1e-4], np.float32)  # in bfloat16 the sum would be a tie
    edits = LogitEdits(np.array([0]), np.array([1]), np.ones(1, np.float32), bias)
    (sampled,) = sample(logits, [1], [SamplingParams(edits=edits)])
    assert sampled.tokens.tolist() == [1]


def test_a_text_whose_logits_are_not_finite_raises():
    logits = torch.zeros(2, 40)
    logits[1, 3] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        sample(logits, [1, 1], [SamplingParams(), SamplingParams()])


def test_a_mask_that_allows_nothing_raises():
    nothing = SamplingParams(allowed=np.zeros((1, 2), np.uint32))
    with pytest.raises(NumericalError, match="not finite"):
        sample(torch.zeros(2, 40), [1, 1], [SamplingParams(), nothing])
