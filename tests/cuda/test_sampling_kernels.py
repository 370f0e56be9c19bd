"""The kernels of sampling, and of the drafts' noise and log probabilities, by the interpreter.

`conformance/test_sampling.py` has the tokens of the first, `test_triton_kernels.py` the faults.
"""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from parts import load_with_parts
from stand_ins import stand_in

from treeflash.config import SamplingConfig
from treeflash.decoding import sampling as definition
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.sampling import LogitEdits, Noise, SamplingParams, position_keys
from treeflash.decoding.session import SequenceSession
from treeflash.testing import DIALECTS, require
from treeflash.testing.models import write_dialect, write_pair

require("torch")
require("triton")

import torch
import triton_interpreter  # noqa: F401 - repairs it
from recordings import recording
from treeflash_cuda import operations
from treeflash_cuda import sampling as sampler
from treeflash_cuda.gpu.triton_kernels import noise as noise_kernels
from treeflash_cuda.gpu.triton_kernels import sampling
from treeflash_cuda.sampling import Logits, sample

VOCAB = 300
ROWS = [sampling.sample_rows, operations.sample_rows]
IDS = ["kernel", "definition"]
FILTERED = SamplingConfig(temperature=0.9, top_k=40, top_p=0.8, min_p=0.02)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of tokens, and a part of one, for some programs of a row."""
    stand_in(monkeypatch, sampling, BLOCK=128)
    stand_in(monkeypatch, noise_kernels, BLOCK=64, PARTS=4)


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
    counted = Mock(wraps=sampling.sample_rows)
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
    launches = [x for (x, *_), _ in counted.call_args_list]
    assert [(len(x), x.dtype) for x in launches] == [(4, torch.bfloat16), (2, torch.float32)]
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


def uploaded(scales, seed=5):
    """Keys and scales of rows, as `OutputStage.upload` gives them."""
    if not scales:
        return torch.empty((0, 3), dtype=torch.int32), None
    keys = position_keys(seed, np.arange(len(scales), dtype=np.int32))
    numbers = np.column_stack([keys.view(np.int32), np.float32(scales).view(np.int32)])
    return torch.from_numpy(numbers), keys


@pytest.mark.parametrize("groups", [None, 1, 2, 4])
def test_noise_is_that_of_the_core(groups):
    noise, keys = uploaded([1, 0.8, 0, 2])
    tokens, expected = VOCAB, definition.gumbel(keys, np.arange(VOCAB, dtype=np.int32))
    if groups is not None:
        chosen = np.random.default_rng(0).integers(0, VOCAB, (groups, 70)).astype(np.int32)
        tokens = torch.from_numpy(chosen).long()
        expected = definition.gumbel(keys, chosen.repeat(4 // groups, 0))
    scales = np.array([[1], [0.8], [0], [2]], np.float32)
    found = noise_kernels.draft_noise(noise, tokens).numpy()
    np.testing.assert_allclose(found, expected * scales, rtol=2e-6, atol=1e-6)


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scales", [(), (1, 0, 0.7)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_ids", [False, True])
def test_log_probabilities_are_those_of_noisy_logits(dtype, scales, temperature, with_ids):
    noise, _ = uploaded(scales)
    logits = torch.tensor(np.random.default_rng(1).normal(size=(3, VOCAB)) * 3).to(dtype)
    logits[1, 5:] = -torch.inf  # some parts have no token
    ids = torch.arange(VOCAB).flip(0) * 2 if with_ids else None
    found = noise_kernels.noisy_log_probs(logits, noise, temperature, ids)
    expected = operations.noisy_log_probs(logits, noise, temperature, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    assert found.topk(9).indices.equal(expected.topk(9).indices)


def test_nan_spreads_over_its_row_alone():
    """Whoever reads the table has to find it."""
    logits = torch.zeros(2, VOCAB)
    logits[0, 7] = torch.nan
    found = noise_kernels.noisy_log_probs(logits, uploaded(())[0], 1.0)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


@pytest.mark.sample(4)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "dialect", ["treeflash", "dflash", "specforge-domino", "speculators-dflash2"]
)
def test_tables_have_the_tokens_of_tables_without_kernels(tmp_path, monkeypatch, dialect, sampled):
    target, drafter = write_pair(tmp_path, "qwen3", vocab_size=VOCAB)
    if dialect in DIALECTS:
        write_dialect(drafter, target, dialect, seed=2)
    backend = load_with_parts(monkeypatch, target, drafter)
    texts = [SequenceSession(backend, drafts=True) for _ in range(2)]
    blocks = [text.draft(text.extend([3 + i, 4, 5])) for i, text in enumerate(texts)]
    depths = len(blocks[0].hidden)
    after = np.arange(4, 4 + depths, dtype=np.int32)
    sampled_text = SamplingConfig(temperature=0.8, seed=3)
    noise = Noise.from_positions([(sampled_text, after), (SamplingConfig(), after)])
    options = TableOptions(m=4, k=4, shortlist=32, rows=8, noise=noise if sampled else None)
    make = backend.drafter.marginals if backend.head is None else backend.head.transitions
    expected = make(blocks, options)
    backend.target.operations = replace(
        backend.target.operations,
        draft_noise=noise_kernels.draft_noise,
        noisy_log_probs=noise_kernels.noisy_log_probs,
    )
    for one, other in zip(make(blocks, options), expected, strict=True):
        for name in ("tokens", "next_row"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
