"""The kernels of the drafts' noise and log probabilities, run by Triton's interpreter."""

from dataclasses import replace

import numpy as np
import pytest
from parts import load_with_parts

from treeflash.config import SamplingConfig
from treeflash.decoding import sampling as definition
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.sampling import Noise, position_keys
from treeflash.decoding.session import SequenceSession
from treeflash.testing import DIALECTS, require
from treeflash.testing.models import write_dialect, write_pair

require("torch")
require("triton")

import torch
import triton_interpreter  # noqa: F401 - repairs it
from faulty_kernels import faulty
from treeflash_cuda import operations
from treeflash_cuda.gpu.triton_kernels import noise as kernels
from treeflash_cuda.operations import Operations, Shapes, checked

VOCAB = 300
SAMPLED = SamplingConfig(temperature=0.8, seed=3)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)  # several of them for some programs of a row
    monkeypatch.setattr(kernels, "PARTS", 4)


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
    found = kernels.draft_noise(noise, tokens).numpy()
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
    found = kernels.noisy_log_probs(logits, noise, temperature, ids)
    expected = operations.noisy_log_probs(logits, noise, temperature, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    assert found.topk(9).indices.equal(expected.topk(9).indices)


def test_nan_spreads_over_its_row_alone():
    """Whoever reads the table has to find it."""
    logits = torch.zeros(2, VOCAB)
    logits[0, 7] = torch.nan
    found = kernels.noisy_log_probs(logits, uploaded(())[0], 1.0)
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
    noise = Noise.from_positions([(SAMPLED, after), (SamplingConfig(), after)])
    options = TableOptions(m=4, k=4, shortlist=32, rows=8, noise=noise if sampled else None)
    make = backend.drafter.marginals if backend.head is None else backend.head.transitions
    expected = make(blocks, options)
    backend.target.operations = replace(
        backend.target.operations,
        draft_noise=kernels.draft_noise,
        noisy_log_probs=kernels.noisy_log_probs,
    )
    for one, other in zip(make(blocks, options), expected, strict=True):
        for name in ("tokens", "next_row"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


FAULTS = {
    "no scale": ("first_key, second_key) * scale", "first_key, second_key)"),
    "other rows' tokens": ("row // rows * width", "row * 0"),
    "no temperature": ("tl.div_rn(x, temperature)", "x"),
    "no ids": ("if HAS_IDS else tokens", "if False else tokens"),
    "a part is left out": ("tl.sum(totals * tl.exp", "tl.max(totals * tl.exp"),
    "a block is left out": ("for block in range(part, tl", "for block in range(part + PARTS, tl"),
}


@pytest.mark.parametrize(("right", "wrong"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_kernel_fails_the_check_at_load(right, wrong, tmp_path):
    broken = faulty(kernels, tmp_path, right, wrong)
    loaded = Operations(draft_noise=broken.draft_noise, noisy_log_probs=broken.noisy_log_probs)
    shapes = Shapes(heads=2, kv_heads=1, head_dim=16, hidden_size=24)
    found = checked(loaded, shapes, torch.device("cpu"), torch.float32)
    assert not (found.has_kernel("draft_noise") and found.has_kernel("noisy_log_probs"))
