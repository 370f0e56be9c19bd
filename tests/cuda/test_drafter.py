"""Numbers of a drafter: its dtypes, its operations, and weights of 4 or 8 bits."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from mtp_pairs import write_mtp_pair
from recordings import recording

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.hub.models import resolve_drafter
from treeflash.testing import require
from treeflash.testing.comparisons import steps_of, tokens_of
from treeflash.testing.models import write_pair
from treeflash.text.tokenizer import Tokenizer

require("torch")
require("llvmlite")

import torch
import torch.nn.functional as F
from torch import nn
from treeflash_cuda import drafter_operations as parts
from treeflash_cuda.backend import load
from treeflash_cuda.cpu import low_bit_loading
from treeflash_cuda.drafter_loading import pack_drafter
from treeflash_cuda.linear import weights_by_format
from treeflash_cuda.operations import PYTORCH
from treeflash_cuda.quantised_weights import BITS, GROUP, quantise_weight
from treeflash_cuda.state import MAX_UNPROJECTED

SIZES = SimpleNamespace(hidden_size=16, intermediate_size=32)


def test_frequencies_stay_in_float32(pair):
    exact = load(*pair, LoadConfig(**ON_CPU)).drafter_model.rotary.inv_freq
    half = load(*pair, LoadConfig(device="cpu", dtype="bfloat16")).drafter_model
    assert half.fc.weight.dtype == torch.bfloat16
    assert torch.equal(half.rotary.inv_freq, exact)
    assert half.rotary.inv_freq.dtype == torch.float32


def test_many_features_do_not_wait_for_a_draft(pair):
    """Several layers have several times as many numbers as features."""
    backend = load(*pair, LoadConfig(**ON_CPU))
    text = SequenceSession(backend, drafts=True)
    text.extend([3, 4, 5])
    with recording(backend.drafter_model, "project") as calls:
        for _ in range(MAX_UNPROJECTED + 3):
            text.verify(DraftTree.root_only(5))
            text.commit(np.zeros(1, np.int32))
    assert [len(outputs) for (outputs,) in calls] == [MAX_UNPROJECTED]


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


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return write_pair(folder, "qwen3", vocab_size=40, hidden_size=2 * GROUP)


ON_CPU = {"device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_by_half_a_step(dtype, bits):
    weight = torch.randn(6, 3 * GROUP, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, :GROUP], weight[1, :GROUP] = 0, 1000 * weight[1, :GROUP]
    quantised = quantise_weight(weight, bits)
    assert quantised.bits == bits
    assert quantised.numbers.nbytes == weight.numel() * bits // 8
    found = quantised.dequantised()
    assert (found.dtype, found.shape) == (dtype, weight.shape)
    groups, error = (x.float().unflatten(1, (-1, GROUP)) for x in (weight, found - weight))
    largest = groups.abs().amax(2, keepdim=True)
    step = (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / (2**bits - 1)
    # The scale, the least number and the weight are rounded to the dtype.
    assert (error.abs() <= step / 2 + 4 * torch.finfo(dtype).eps * largest).all()
    assert (found[0, :GROUP] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_norms_are_compiled_beside_layers_that_are(pair, dtype):
    backend = load(*pair, LoadConfig(device="cpu", dtype=dtype))
    assert backend.target.kernels is not None
    layer = backend.drafter_model.layers[0]
    for norm in (layer.input_layernorm, layer.self_attn.q_norm, backend.head.module.norm):
        assert "forward" in vars(norm)
        x = torch.randn(2, 6, len(norm.weight)).to(backend.target.dtype)[:, ::2]
        expected = F.rms_norm(x.float(), norm.weight.shape, norm.weight.float(), norm.eps)
        torch.testing.assert_close(norm(x).float(), expected, rtol=0.01, atol=1e-5)


def test_an_output_head_of_its_own_that_has_no_whole_groups_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(low_bit_loading, "GROUP", 2 * low_bit_loading.GROUP)
    backend = load(*write_mtp_pair(tmp_path, "eagle3"), LoadConfig(draft_bits=4, **ON_CPU))
    model = backend.drafter_model
    assert model.own.quantised_lm_head is None
    assert model.own.lm_head is not None
    weights = [*model.parameters(), *model.buffers()]  # and none of the target's
    assert backend.weights_read["a draft reads"].total() == sum(x.nbytes for x in weights)


@pytest.mark.nightly
def test_the_bundled_drafter_accepts_nearly_as_many_tokens(smollm2):
    prompt = Tokenizer.from_folder(smollm2).chat(
        [{"role": "user", "content": "Explain how rainbows form."}]
    )
    config = DecodeConfig(budget=16, max_tokens=100)
    texts, iterations = [], {}
    for bits in (16, *BITS):
        backend = load(smollm2, resolve_drafter(None, None), LoadConfig(draft_bits=bits, **ON_CPU))
        steps = steps_of(backend, prompt, config)
        texts.append(tokens_of(steps))
        iterations[bits] = len(steps)
    assert texts[0] == texts[1] == texts[2]
    assert iterations[8] <= 1.05 * iterations[16]
    assert iterations[4] <= 1.2 * iterations[16]


def reads(backend):
    return {name: dict(formats) for name, formats in backend.weights_read.items()}


# Three seconds in Triton's interpreter; `test_triton_kernels.py` runs these products, too.
@pytest.mark.nightly
def test_a_draft_on_a_gpu_reads_the_numbers(cuda, pair):
    plain, quantised = (load(*pair, LoadConfig(dtype="bfloat16", draft_bits=x)) for x in (16, 4))
    before, after = reads(plain), reads(quantised)
    assert before["a pass reads"] == after["a pass reads"]
    numbers = after["a draft reads"]["QuantisedLinear"]
    quantised_nbytes = before["a draft reads"]["bfloat16"] - after["a draft reads"]["bfloat16"]
    # Two numbers in 16 bits are added to a group of 64; biases stay as they are.
    share = (4 + 2 * 16 / GROUP) / 16
    assert numbers / quantised_nbytes == pytest.approx(share, rel=0.05)
    request = Request(prompt_ids=[1, 2, 3], config=DecodeConfig(budget=8, max_tokens=4))
    list(decode(quantised, request))
    assert "quantised_linear" in cuda.launches
    assert quantised.captures > 0


def test_formats_of_layers_that_libraries_quantise_are_counted_by_their_class():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(8, 16, dtype=torch.int32))
            self.register_buffer("scales", torch.zeros(2, 16, dtype=torch.float16))

    lm_head = nn.Linear(16, 4, bias=False)
    model = nn.ModuleList([nn.Embedding(4, 16), Packed(), lm_head, nn.Linear(16, 8), lm_head])
    model[0].weight = lm_head.weight
    found = weights_by_format([model])
    assert found == {"Packed": 8 * 16 * 4 + 2 * 16 * 2, "float32": (4 + 8) * 16 * 4 + 8 * 4}
