"""Launches and faults of the sampling kernel; `conformance/test_sampling.py` has its tokens."""

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding import sampling as definition
from treeflash.decoding.sampling import LogitEdits, SamplingParams, position_keys
from treeflash.testing import require

require("torch")
require("triton")

import torch
import triton_interpreter  # noqa: F401 - repairs it
from faulty_kernels import faulty
from recordings import recording
from treeflash_cuda import operations
from treeflash_cuda import sampling as sampler
from treeflash_cuda.gpu.triton_kernels import sampling
from treeflash_cuda.operations import Operations, Shapes, checked
from treeflash_cuda.sampling import Logits, sample

VOCAB = 300
ROWS = [sampling.sample_rows, operations.sample_rows]
IDS = ["kernel", "definition"]
FILTERED = SamplingConfig(temperature=0.9, top_k=40, top_p=0.8, min_p=0.02)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 128)  # several of them, and a part of one


def inputs(rows, dtype, seed, scale=3.0):
    """(rows, VOCAB) logits of a dtype, and (rows, 2) keys."""
    numbers = np.random.default_rng(seed).normal(size=(rows, VOCAB)) * scale
    return torch.tensor(numbers).to(dtype), position_keys(seed, np.arange(rows, dtype=np.int32))


def tensors(settings, keys):
    values = [(0 if x.greedy else x.temperature, x.top_k, x.top_p, x.min_p) for x in settings]
    rows = torch.tensor(values, dtype=torch.float32)
    return torch.from_numpy(keys.view(np.int32)), rows


@pytest.mark.parametrize("sample_rows", ROWS, ids=IDS)
def test_rows_without_a_finite_best_logit_are_reported(sample_rows):
    logits, keys = inputs(5, torch.float32, 1)
    logits[0, 7] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    logits[3, :-1] = -torch.inf  # only one token is allowed
    settings = [SamplingConfig(temperature=1.0, top_p=0.9)] * 5
    found = sample_rows(logits, *tensors(settings, keys)).tolist()
    assert found[:4] == [-1, -1, -1, VOCAB - 1]
    assert found[4] >= 0


def test_sequences_with_different_settings_take_one_launch_for_each_dtype():
    """Greedy ones, and those whose tokens are masked among them; float32 is for edited ones."""
    launches = []

    def counted(*args):
        launches.append(args)
        return sampling.sample_rows(*args)

    sizes = (3, 1, 4, 2)
    logits, keys = inputs(sum(sizes), torch.bfloat16, 7)
    parts, starts = list(logits.split(sizes)), np.cumsum((0, *sizes[:-1]))
    allowed = definition.only(np.array([11], np.int32), VOCAB)
    ones = np.ones(2, np.float32)
    edits = LogitEdits(np.array([0, 1]), np.array([4, 5]), ones, 20 * ones)
    params = [
        SamplingParams(FILTERED, keys[:3]),
        SamplingParams(allowed=allowed),
        None,
        SamplingParams(SamplingConfig(temperature=1.0), keys[8:], edits=edits),
    ]
    found = sample(Logits(parts, [None] * 4), params, sample_rows=counted)
    assert [(len(x), x.dtype) for x, *_ in launches] == [(4, torch.bfloat16), (2, torch.float32)]
    for i, one in enumerate(params):
        if one is None:
            assert found[i] is None
            continue
        rows = parts[i].float().numpy()
        np.testing.assert_array_equal(found[i].tokens, definition.sample(rows, one).tokens)
    assert starts[3] == 8


@pytest.mark.parametrize("top_k", [10**40, 10**400], ids=["float64", "none"])
def test_a_top_k_that_a_float32_does_not_hold_keeps_all_tokens(top_k):
    """One request with such a number must not end the requests of the whole batch."""
    logits, keys = inputs(3, torch.float32, 7)
    params = SamplingParams(SamplingConfig(temperature=1.0, top_k=top_k), keys)
    (found,) = sample(Logits([logits], [None]), [params], sample_rows=operations.sample_rows)
    np.testing.assert_array_equal(found.tokens, definition.sample(logits.numpy(), params).tokens)


def test_equal_choices_need_no_copy_of_the_logits():
    logits = torch.zeros(5, 40)
    with recording(sampler, "sample_tokens") as calls:
        params = [SamplingParams(), None, SamplingParams()]
        sample(Logits.split(logits, [2, 0, 3]), params, sample_rows=None)
    assert calls[0][0].data_ptr() == logits.data_ptr()


def test_greedy_tokens_that_are_known_are_not_computed_again():
    logits, _ = inputs(3, torch.bfloat16, 7)
    best = [logits.argmax(-1)]
    (found,) = sample(Logits([logits], best), [SamplingParams()], sample_rows=lambda *_: 1 / 0)
    assert found.tokens.tolist() == best[0].tolist()


FAULTS = {
    "no temperature": ("score = (x - best) / divisor", "score = x - best"),
    "top-k keeps one more": (".to(tl.float32) >= top_k", ".to(tl.float32) > top_k"),
    "a digit too low": ("enough.to(tl.int32), 0) - 1", "enough.to(tl.int32), 0) - 2"),
    "no top-p": ("edge = tl.maximum(edge, nucleus)", "edge = edge"),
    "no min-p": ("tl.exp(score) >= least", "tl.exp(score) >= 0"),
    "no second hash": ("^ second_key)", "^ first_key)"),
    "not finite": ("token = tl.where(is_finite,", "token = tl.where(is_finite | True,"),
}


@pytest.mark.parametrize(("right", "wrong"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_kernel_fails_the_check_at_load(right, wrong, tmp_path, monkeypatch):
    broken = faulty(sampling, tmp_path, right, wrong)
    monkeypatch.setattr(operations, "SAMPLES", 3)
    kernels = Operations(sample_rows=broken.sample_rows)
    shapes = Shapes(heads=2, kv_heads=1, head_dim=16, hidden_size=24)
    found = checked(kernels, shapes, torch.device("cpu"), torch.float32)
    assert not found.has_kernel("sample_rows")
