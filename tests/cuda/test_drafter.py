"""A drafter: its dtypes, its weights of 4 or 8 bits, and its layers in one call."""

from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from faulty_kernels import faulty
from long_contexts import check_long_contexts
from mtp_pairs import write_mtp_pair
from parts import load_with_parts
from recordings import recording
from stand_ins import stand_in

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
from treeflash_cuda import drafter_model as parts
from treeflash_cuda import linear
from treeflash_cuda.backend import load
from treeflash_cuda.cpu import drafter_calls
from treeflash_cuda.cpu.drafter_calls import BlockCalls
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


def test_a_long_prompt_is_read_some_at_a_time_in_rows(pair, monkeypatch):
    """As on a GPU; `engines/test_drafting.py` has masks."""
    backend = load_with_parts(monkeypatch, *pair)
    assert backend.drafter._has_slab_pass
    check_long_contexts(monkeypatch, backend)


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
    operation = Mock(wraps=getattr(PYTORCH, name))
    model.operations = replace(PYTORCH, **{name: operation})
    target = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
    pack_drafter(model, None, target, None)
    torch.testing.assert_close(model(x), expected)
    operation.assert_called_once()


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
        assert norm.compiled is not None
        x = torch.randn(2, 6, len(norm.weight)).to(backend.target.dtype)[:, ::2]
        expected = F.rms_norm(x.float(), norm.weight.shape, norm.weight.float(), norm.eps)
        torch.testing.assert_close(norm(x).float(), expected, rtol=0.01, atol=1e-5)


def test_weights_are_rounded_in_whole_groups():
    on_gpu = linear.quantising(4, PYTORCH.quantised_linear)
    for packing, group in ((linear.rounding(4), linear.LOW_BIT_GROUP), (on_gpu, GROUP)):
        sizes = 2 * group, group + group // 2
        assert [packing.fits(torch.empty(3, size)) for size in sizes] == [True, False]


def test_an_output_head_of_its_own_that_has_no_whole_groups_stays_as_it_is(tmp_path, monkeypatch):
    stand_in(monkeypatch, linear, LOW_BIT_GROUP=2 * linear.LOW_BIT_GROUP)
    backend = load(*write_mtp_pair(tmp_path, "eagle3"), LoadConfig(draft_bits=4, **ON_CPU))
    model = backend.drafter_model
    assert model.own.quantised_lm_head is None
    assert model.own.lm_head is not None
    weights = [*model.parameters(), *model.buffers()]  # and none of the target's
    assert backend.weights_read["a draft reads"].total() == sum(x.nbytes for x in weights)


# The default pair, three times; the tests above compare rounded weights with whole ones.
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


KINDS = {
    "everything is seen": {},
    "causal": {"causal": (True, False)},
    "windows": {"sliding_windows": (None, 9)},
    "a window inside blocks": {"sliding_windows": (3, None)},
    "a causal window": {"sliding_windows": (3, 9), "causal": (True, True)},
    "a window before the root": {"sliding_windows": (4, None), "window_from_root": True},
}
TOLERANCE = 0.03
"""Share of the largest output: activations are rounded to 8 bits, which turns a difference of
rounding into a larger one."""


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    folders = write_pair(tmp_path_factory.mktemp("pair"), "qwen3", vocab_size=40, hidden_size=128)
    return load(*folders, LoadConfig(device="cpu", dtype="float32", draft_bits=8))


def drafts_of(backend):
    """Outputs of blocks, and keys and values: with new positions, without, and of two sequences."""
    rng = np.random.default_rng(5)
    found = []
    with ExitStack() as stack:
        sessions = [SequenceSession(backend, drafts=True) for _ in range(2)]
        for session, length in zip(sessions, (17, 2), strict=True):
            stack.enter_context(closing(session.state))
            session.extend(rng.integers(0, 39, length).tolist())
        first, second = (session.state for session in sessions)
        for batch in ([(first, 3)], [(first, 4)], [(second, 5), (first, 6)], [(second, 7)]):
            found += [block.slots for block in backend.drafter.draft(batch)]
            sessions[0].extend(rng.integers(0, 39, 3).tolist())
        found += [torch.from_numpy(state.drafter.read()) for state in (first, second)]
    return found


@contextmanager
def drafting(backend, kind, calls=lambda model, dtype: None):
    """Let layers of a kind run as these calls; without them as modules."""
    model = backend.drafter_model
    before = model.config, model.calls
    model.config = replace(model.config, **KINDS[kind])
    model.calls = calls(model, torch.float32)
    try:
        yield
    finally:
        model.config, model.calls = before


def near(actual, expected):
    assert len(actual) == len(expected)
    pairs = zip(actual, expected, strict=True)
    return all((x - y).abs().max() <= TOLERANCE * y.abs().max() for x, y in pairs)


@pytest.fixture(scope="module")
def expected(backend):
    """What modules give for each kind of layers."""
    found = {}
    for kind in KINDS:
        with drafting(backend, kind):
            found[kind] = drafts_of(backend)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_they_give_what_modules_give(backend, expected, kind):
    with drafting(backend, kind, BlockCalls.of), recording(BlockCalls, "run") as runs:
        assert near(drafts_of(backend), expected[kind])
    assert len(runs) == 4


FAULTS = {
    "none": ("ROPE = 0", "ROPE = 0"),
    "the context's rotation for blocks": ("positions.roll(-len(context))", "positions"),
    "rotation to the other side": ("].neg_()", "].abs_()"),
    "no context": ("of_context=x.layer in of_context", "of_context=False"),
    "queries of the context alone": (
        "= attention.k_proj, attention.v_proj",
        "= (attention.q_proj,)",
    ),
    "the context behind the block": ("(cache, cache.length, start", "(cache, start, start"),
    "slots that see up to themselves": ("slots if is_causal else lasts", "slots"),
    "slots that see all slots": ("slots if is_causal else lasts", "lasts"),
    "a window that is too wide": ("slots - window + 1", "slots - window"),
    "a window that is too narrow behind": ("np.minimum(slots + window - 1", "np.minimum(slots"),
    "a window from each slot": ("firsts = roots - window", "firsts = slots - window"),
    "no residual": ("return y + residual", "return y"),
    "norms of keys for queries": ("attention.q_norm.weight, ", "attention.k_norm.weight, "),
    "the other norm": ("layer.input_layernorm", "layer.post_attention_layernorm"),
    "factors for gates": (
        "network.gate_proj, network.up_proj",
        "network.up_proj, network.gate_proj",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(tmp_path, backend, expected, fault):
    broken = faulty(drafter_calls, tmp_path, *FAULTS[fault])

    def is_right(kind):
        with drafting(backend, kind, broken.BlockCalls.of):
            return near(drafts_of(backend), expected[kind])

    assert all(map(is_right, KINDS)) == (fault == "none")


def test_modules_run_where_blocks_do_not_see_some_positions(backend, monkeypatch):
    """The last draft's sequence is too short for a gap between its first positions and a window."""
    stand_in(monkeypatch, backend.drafter, window=4)
    with recording(BlockCalls, "run") as runs:
        drafts_of(backend)
    assert len(runs) == 1


def test_modules_run_in_other_dtypes(backend):
    assert BlockCalls.of(backend.drafter_model, torch.bfloat16) is None
