"""Numbers of the drafter, and the memory that its features take."""

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.testing import require
from treeflash.testing.models import write_pair

require("torch")

import torch
from treeflash_cuda.backend import load

CPU = LoadConfig(device="cpu", dtype="float32")
PROMPT = [3, 4, 5, 6, 7, 8, 9]


@pytest.fixture
def folders(tmp_path):
    return write_pair(tmp_path, "qwen3")


def test_frequencies_stay_in_float32(folders):
    exact = load(*folders, CPU).drafter_model.rotary.inv_freq
    half = load(*folders, LoadConfig(device="cpu", dtype="bfloat16")).drafter_model
    assert half.fc.weight.dtype == torch.bfloat16
    assert torch.equal(half.rotary.inv_freq, exact)
    assert half.rotary.inv_freq.dtype == torch.float32


def test_long_prompts_are_projected_chunk_by_chunk(folders):
    """Outputs of several layers are larger than what is made of them."""
    backend = load(*folders, CPU)
    prompt = np.random.default_rng(3).integers(0, 24, 50).tolist()
    whole = SequenceSession(backend, drafts=True)
    whole.extend(prompt)
    backend.verifier.first_chunk, backend.verifier.next_chunk = 16, 8
    rows = []
    backend.drafter_model.fc.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    text = SequenceSession(backend, drafts=True)
    text.extend(prompt)
    assert rows == [16, 8, 8, 8, 8, 2]
    features = torch.cat(text.state.context)
    assert features.shape == (50, 32)
    torch.testing.assert_close(features, *whole.state.context, atol=1e-5, rtol=1e-4)


def test_waiting_features_are_projected(folders):
    backend = load(*folders, CPU)
    text = SequenceSession(backend, drafts=True)
    text.extend(PROMPT)
    assert [features.shape for features in text.state.context] == [(len(PROMPT), 32)]
