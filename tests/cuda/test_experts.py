"""Experts on a GPU, computed by one product without a read on the host."""

import warnings
from types import SimpleNamespace

import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.tree import DraftTree
from treeflash.testing import require
from treeflash.testing.models import write_target
from treeflash.testing.pairs import each_value

require("torch")

import numpy as np
import torch
from torch import nn
from treeflash_cuda.backend import load
from treeflash_cuda.drafter_loading import pack_drafter
from treeflash_cuda.drafter_operations import Experts
from treeflash_cuda.operations import Operations


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("capability", "dtype"),
    each_value([(8, 0), (8, 9), (9, 0), (12, 0)], ["bfloat16", "float16", "float32"]),
)
def test_experts_are_captured_on_every_device(cuda, tmp_path, capability, dtype):
    """PyTorch's own product copies to the host on most devices, which a graph cannot do."""
    cuda.capability = capability
    write_target(tmp_path, "qwen3_moe", seed=1, vocab_size=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend = load(tmp_path, None, LoadConfig(dtype=dtype))
        state = backend.open(40, drafts=False)
        captures = backend.captures
        # It has as many rows as the tree, so that both replay one graph.
        backend.verifier.run([Prefill(state, [3, 4, 5], None)])
        tree = DraftTree.chain(np.arange(4, dtype=np.int32), np.zeros(4))
        with cuda.transfers() as transfers:
            backend.verifier.run([Verify(state, tree, SamplingParams())])
    assert backend.captures > captures
    assert transfers.reads == 1  # the tokens


@torch.inference_mode()
def test_experts_of_heads_compute_what_a_loop_over_experts_does():
    """One expert of five has no rows."""
    torch.manual_seed(0)
    experts = Experts(size=12, width=8, count=5)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    chosen = torch.tensor([[0, 3], [3, 4], [1, 0], [3, 1]])
    x, weights = torch.randn(4, 12), torch.rand(4, 2)
    expected = experts(x, chosen, weights)
    layer = nn.ModuleList([experts])
    layer.operations = Operations()  # as a drafter has them on a GPU
    pack_drafter(
        layer, None, SimpleNamespace(dtype=torch.float32, device=experts.gate_proj.device), None
    )
    assert experts.operations is layer.operations
    torch.testing.assert_close(experts(x, chosen, weights), expected)
