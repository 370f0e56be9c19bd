"""Numbers of the drafter, and the memory that its features take."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.testing import require
from treeflash.testing.models import write_pair

require("torch")

import torch
from torch import nn
from treeflash_cuda import drafter_operations as parts
from treeflash_cuda.backend import load
from treeflash_cuda.drafter_loading import pack_drafter
from treeflash_cuda.operations import PYTORCH
from treeflash_cuda.state import Unprojected
from treeflash_cuda.verifier import MAX_UNPROJECTED

CPU = LoadConfig(device="cpu", dtype="float32")
PROMPT = [3, 4, 5, 6, 7, 8, 9]
SIZES = SimpleNamespace(hidden_size=16, intermediate_size=32)


@pytest.fixture
def folders(tmp_path):
    return write_pair(tmp_path, "qwen3")


def test_frequencies_stay_in_float32(folders):
    exact = load(*folders, CPU).drafter_model.rotary.inv_freq
    half = load(*folders, LoadConfig(device="cpu", dtype="bfloat16")).drafter_model
    assert half.fc.weight.dtype == torch.bfloat16
    assert torch.equal(half.rotary.inv_freq, exact)
    assert half.rotary.inv_freq.dtype == torch.float32


def test_tokens_that_are_decoded_one_by_one_are_projected_when_a_draft_reads_them(folders):
    """Or when many wait. Forks, and states that were stored, go on as the sequence does."""
    backend = load(*folders, CPU)
    project = backend.drafter_model.project = Counted(backend.drafter_model.project)
    count = MAX_UNPROJECTED + 3
    texts = [SequenceSession(backend, drafts=True) for _ in range(3)]
    text, restored, whole = texts
    whole.extend(PROMPT + [5] * count)
    text.extend(PROMPT)
    assert project.calls == 2
    for _ in range(count):
        text.verify(DraftTree.root_only(5))
        text.commit(np.zeros(1, np.int32))
    assert project.calls == 3
    assert sum(isinstance(part, Unprojected) for part in text.state.context) == 3
    copied = text.fork(text.length, text.length + 20)
    stored = text.state.export(0, text.length, end=True).arrays()
    restored.state.append(text.state.tokens, stored)
    restored.extend([6])
    for other in (text, copied, whole):
        other.extend([6])
    expected = whole.draft(7).hidden
    for other in (text, copied, restored):
        torch.testing.assert_close(other.draft(7).hidden, expected, atol=1e-5, rtol=1e-5)
        assert not other.state.context


class Counted:
    """An operation that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: parts.RMSNorm(16, 1e-5), "rms_norm"),
        (lambda: parts.Float32Norm(16, 1e-5), "rms_norm"),
        (lambda: parts.MLP(SIZES), "gated"),
        (lambda: parts.Gemma4MLP(SIZES), "gated"),
    ],
)
@torch.inference_mode()
def test_operations_of_a_gpu_compute_parts_of_a_drafter(make, name):
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(2, 3, 16)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.normal_()
    expected = model(x)
    operation = Counted(getattr(PYTORCH, name))
    model.operations = replace(PYTORCH, **{name: operation})
    target = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
    pack_drafter(model, None, target, None)
    torch.testing.assert_close(model(x), expected)
    assert operation.calls == 1
