"""Experts of models of transformers, computed by one product without a read on the host."""

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
from families import OVERRIDES, SMALL
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from treeflash_cuda.backend import load
from treeflash_cuda.drafter_loading import pack_drafter
from treeflash_cuda.drafter_operations import Experts
from treeflash_cuda.hf import experts as experts_module
from treeflash_cuda.hf.experts import fuse_experts, has_experts
from treeflash_cuda.operations import Operations, grouped_linear

FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h", "mixtral", "deepseek_v3")
"""With and without biases, gates and interleaved gates; weights in both layouts."""


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    settings = SMALL | OVERRIDES.get(request.param, {})
    config = CONFIG_MAPPING[request.param](**settings)
    return AutoModelForCausalLM.from_config(config).eval()


def experts_of(model):
    found = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    assert found
    return found


def inputs_of(module, rows, *, beyond=False):
    size = module.down_proj.shape[2 if module.is_transposed else 1]
    generator = torch.Generator().manual_seed(rows)
    scores = torch.rand(rows, module.num_experts, generator=generator)
    weights, chosen = scores.topk(2)
    if beyond:
        chosen[0, 1] = module.num_experts  # no expert
    return torch.randn(rows, size, generator=generator), chosen, weights


@torch.inference_mode()
def test_experts_compute_what_transformers_computes(model):
    assert has_experts(model)
    cases = [(module, module.forward) for module in experts_of(model)]
    fuse_experts(model, Operations(), torch.float32)
    for module, plain in cases:
        assert "forward" in vars(module)
        for rows in (1, 2, 33):
            inputs = inputs_of(module, rows)
            torch.testing.assert_close(module(*inputs), plain(*inputs))


@torch.inference_mode()
def test_a_row_may_have_fewer_experts():
    settings = SMALL | {"num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_moe"](**settings))
    (module,) = experts_of(model)
    inputs = inputs_of(module, 5, beyond=True)
    model.set_experts_implementation("eager")  # knows rows without an expert
    expected = module(*inputs)
    fuse_experts(model, Operations(), torch.float32)
    torch.testing.assert_close(module(*inputs), expected)


@torch.inference_mode()
def test_many_rows_stay_with_transformers(model, monkeypatch):
    """It has the faster products for prompts, which are not captured."""
    calls = []

    def counted(*args):
        calls.append(args)
        return grouped_linear(*args)

    fuse_experts(model, Operations(grouped_linear=counted), torch.float32)
    calls.clear()
    monkeypatch.setattr(experts_module, "MAX_ROWS", 4)
    module = experts_of(model)[0]
    module(*inputs_of(module, 4))
    assert len(calls) == 2
    module(*inputs_of(module, 5))
    assert len(calls) == 2


def test_experts_that_the_operation_does_not_compute_are_left_as_they_are(model):
    wrong = Operations(grouped_linear=lambda *args: 1.1 * grouped_linear(*args))
    fuse_experts(model, wrong, torch.float32)
    assert not any("forward" in vars(module) for module in experts_of(model))


def test_dense_models_have_none(tmp_path):
    write_target(tmp_path, "qwen3", seed=1, vocab_size=40)
    assert not has_experts(load(tmp_path, None, LoadConfig(device="cpu")).target.model)


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
