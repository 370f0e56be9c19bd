"""GGUF targets whose weights keep their bits on a CPU: texts, weights, memory, and fallbacks."""

from __future__ import annotations

import json
import logging
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from adapters import write_adapter
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from gguf_files import HIDDEN, write_gguf
from parts import use_models

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash.hub.models import resolve_target
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_drafter, write_target

require("torch")
require("llvmlite")

import torch
from treeflash_cuda.backend import load
from treeflash_cuda.cpu import low_bit_loading
from treeflash_cuda.hf.model_target import ModelTarget
from treeflash_cuda.linear import PackedLinear
from treeflash_cuda.low_bit_linear import LowBitEmbedding, LowBitLinear
from treeflash_cuda.target_loading import bits_refusal

import treeflash

pytestmark = pytest.mark.usefixtures("own_cache")

PROMPT = "the 12 the 12 the"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A tiny Llama with several types, as files named Q4_K_M have: values are not like queries."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    kinds = {"attn_v": Kind.Q5_0, "ffn_down": Kind.Q8_0, "token_embd": Kind.Q8_0}
    write_gguf(path, kind=lambda name: kinds.get(name.rpartition(".")[2], Kind.Q4_1))
    return path


@pytest.fixture(scope="module")
def packed(file, own_cache) -> Path:
    return resolve_target(str(file), packed=True)


@pytest.fixture(scope="module")
def model(file, own_cache):
    return treeflash.load(str(file), False, backend="cuda", device="cpu")


def logits_of(folder: Path, **settings) -> torch.Tensor:
    return run(load(folder, None, LoadConfig(device="cpu", **settings)))


@torch.inference_mode()
def run(pair) -> torch.Tensor:
    """Return the logits of 40 tokens."""
    tokens = DraftTree.chain(np.arange(40, dtype=np.int32))
    with closing(pair.open(40, drafts=False)) as state:
        return pair.verifier.forward([(state, tokens)], [True]).logits.parts[0].float()


def test_a_file_is_exact_in_its_own_bits(model):
    target = model.backend.target
    assert model.backend.inexact is None
    assert (model.backend.dtype, target.token_rows) == ("float32", 1)
    found = [type(x) for x in target.model.modules()]
    # The table and its head; four, three and three layers that are alone or joined.
    assert found.count(LowBitLinear) == 1 + 2 * (4 + 2)
    assert found.count(LowBitEmbedding) == 1
    assert PackedLinear not in found
    assert set(model.backend.weights_read["a pass reads"]) >= {"Q4_1", "Q5_0", "Q8_0"}


def test_an_output_head_of_its_own_keeps_its_bits(tmp_path):
    def add_head(writer):
        weight = np.random.default_rng(1).standard_normal((265, HIDDEN), dtype=np.float32)
        writer.add_tensor("output.weight", quantize(weight, Kind.Q8_0), raw_dtype=Kind.Q8_0)

    write_gguf(tmp_path / "tiny.gguf", add=add_head)
    folder = resolve_target(str(tmp_path / "tiny.gguf"), packed=True)
    target = load(folder, None, LoadConfig(device="cpu")).target
    assert type(target.lm_head) is LowBitLinear
    assert not torch.equal(target.lm_head.rows(torch.arange(9)), target.embed(torch.arange(9)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_those_of_plain_decoding(model, temperature):
    options = {"temperature": temperature, "max_tokens": 24, "seed": 5}
    prompts = [PROMPT, "12", "the", "1\n\n2"]
    expected = [model.generate(x, method="ar", **options).token_ids for x in prompts]
    for prompt, plain, budget in zip(prompts, expected, (4, 8, 16, 64), strict=True):
        text = model.generate(prompt, method="suffix", budget=budget, **options)
        assert text.token_ids == plain
    many = dict(model.generate_many(prompts * 2, method="suffix", parallel=8, **options))
    assert [many[n].token_ids for n in range(8)] == expected * 2


def test_weights_are_mapped_from_the_file(model, packed):
    """Memory of a mapped file is shared, and read when it is needed."""
    ranges = [
        [int(x, 16) for x in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if str(packed / "model.safetensors") in line
    ]
    for module in model.backend.target.model.modules():
        if isinstance(module, LowBitLinear):
            address = module.numbers.data_ptr()
            assert any(first <= address < end for first, end in ranges)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantised_weights_are_the_ones_of_the_file(file, packed, dtype):
    """With `bits` 16 a folder with packed weights is the same model as one in bfloat16."""
    if dtype == "float32":  # bfloat16 would round these weights
        settings = {"dtype": dtype, "bits": 16}
        target = load(packed, None, LoadConfig(device="cpu", **settings)).target
        stored = load(packed, None, LoadConfig(device="cpu", dtype=dtype, exact=True)).target
        assert torch.equal(target.embed(torch.arange(9)), stored.embed(torch.arange(9)))
        return
    plain = resolve_target(str(file))
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    expected = logits_of(plain, dtype=dtype)
    assert torch.equal(logits_of(packed, dtype=dtype, bits=16), expected)


def test_logits_are_near_those_of_dequantised_weights(packed):
    expected = logits_of(packed, dtype="float32", bits=16).log_softmax(-1)
    for dtype, most in (("float32", 0.1), ("bfloat16", 0.2)):
        actual = logits_of(packed, dtype=dtype, exact=True).log_softmax(-1)
        divergence = (expected.exp() * (expected - actual)).sum(-1).mean()
        assert divergence < most


def test_numbers_that_are_not_finite_reach_the_check_of_logits(packed):
    """A layer that overflows must not become a text of likely tokens."""
    pair = load(packed, None, LoadConfig(device="cpu"))
    pair.target.layers[0].register_forward_hook(
        lambda _, __, outputs: tuple(output * torch.inf for output in outputs)
    )
    assert run(pair).isnan().all()


EXCLUDED = {
    "exact": {"exact": False},
    "float32": {"dtype": "float32"},
    "kv_bits": {"kv_bits": 8},
    "bits": {"bits": 16},
}


@pytest.mark.parametrize("settings", EXCLUDED.values(), ids=EXCLUDED)
def test_weights_are_dequantised_without_exact_mode(packed, settings, recwarn):
    """Rounded activations turn differences of float32's rounding into larger ones."""
    config = LoadConfig(device="cpu", **settings)
    assert bits_refusal(config) == ""
    target = load(packed, None, config).target
    assert not any(isinstance(x, LowBitLinear) for x in target.model.modules())
    assert not [x for x in recwarn if "few bits" in str(x.message)]


@pytest.mark.parametrize("bits", [None, 16])
def test_rounded_inputs_are_no_wrong_attention(packed, monkeypatch, bits):
    """A model of transformers is compared with its own attention, whose input is rounded too."""
    use_models(monkeypatch)
    config = LoadConfig(device="cpu", dtype="float32", exact=True, bits=bits)
    target = load(packed, None, config).target
    assert isinstance(target, ModelTarget)
    logits = torch.randn(4, 50)
    others = logits + 0.05 * torch.randn(4, 50)
    assert bool(target._significant_difference(logits, others)) == (bits == 16)


@torch.inference_mode()
def test_an_adapter_is_merged_into_dequantised_weights(packed, tmp_path):
    """They are parts of one packed layer."""
    config = LoadConfig(device="cpu", dtype="float32")
    plain = load(packed, None, replace(config, bits=16)).target
    facts = plain.facts
    keys = facts.kv_heads * facts.head_dim
    first = facts.heads * facts.head_dim
    down, up = torch.randn(2, HIDDEN), torch.randn(keys, 2)
    write_adapter(tmp_path, {"model.layers.0.self_attn.k_proj": (down, up)})
    merged = load(packed, None, replace(config, adapter=str(tmp_path))).target
    x = torch.randn(3, HIDDEN)
    before, after = (
        target.model.layers[0].mixer.qkv(x).tensor_split([first, first + keys], 1)
        for target in (plain, merged)
    )
    torch.testing.assert_close(after[1], before[1] + x @ (up @ down).T, atol=1e-4, rtol=1e-4)
    assert torch.equal(after[0], before[0])


def test_a_target_that_cannot_be_exact_is_dequantised_with_a_line(packed, monkeypatch):
    def refuse(*_):
        raise UnsupportedModelError("exact mode: it is a test")

    monkeypatch.setattr("treeflash_cuda.cpu.decoder_target.bound_products", refuse)
    line = "weights of few bits are dequantised, because exact mode: it is a test"
    with pytest.warns(UserWarning, match=line):
        pair = load(packed, None, LoadConfig(device="cpu"))
    assert pair.dtype == "float32"


def test_without_llvmlite_a_file_becomes_bfloat16_with_a_line(file, monkeypatch, caplog):
    monkeypatch.setattr(low_bit_loading, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        model = treeflash.load(str(file), False, backend="cuda", device="cpu")
    lines = [x.message for x in caplog.records if "take 16 bits" in x.message]
    assert lines == [
        "the weights of tiny take 16 bits, because llvmlite is not installed (pip install llvmlite)"
    ]
    assert not any(isinstance(x, LowBitLinear) for x in model.backend.target.model.modules())


@pytest.mark.parametrize(("asked", "bits"), [(None, "Q8_0"), (4, "Q4_1"), (16, None)])
def test_a_drafter_has_8_bits_beside_it_unless_others_are_asked_for(packed, tmp_path, asked, bits):
    write_drafter(tmp_path, packed, seed=2, target_layer_ids=(0, 1))
    pair = load(packed, tmp_path, LoadConfig(device="cpu", draft_bits=asked))
    layers = pair.drafter_model.fc, pair.drafter_model.layers[0].mlp.down_proj
    assert {getattr(x, "name", None) for x in (*layers, pair.head.module.d)} == {bits}
    assert pair.drafter_model.own.quantised_lm_head is None  # the target's has few bits already
    texts = [
        generate(pair, [5, 6, 7], DecodeConfig(method=method, max_tokens=24, budget=8))
        for method in ("ar", "treeflash")
    ]
    assert texts[0] == texts[1]


def test_a_drafter_stays_as_it_is_beside_dequantised_weights(packed, tmp_path):
    write_drafter(tmp_path, packed, seed=2, target_layer_ids=(0, 1))
    pair = load(packed, tmp_path, LoadConfig(device="cpu", bits=16))
    assert not isinstance(pair.drafter_model.fc, LowBitLinear)


@pytest.mark.parametrize("bits", [4, 8])
def test_other_checkpoints_are_rounded_where_it_is_asked_for(tmp_path, bits):
    folder = tmp_path / "target"
    write_target(folder, "llama", seed=0)
    pair = load(folder, None, LoadConfig(device="cpu", bits=bits))
    assert pair.inexact is None
    name = {4: "Q4_1", 8: "Q8_0"}[bits]
    assert name in pair.weights_read["a pass reads"]
    layers = [x for x in pair.target.model.modules() if isinstance(x, LowBitLinear)]
    rounded = layers[0].rows(torch.arange(layers[0].shape[0]))
    assert len(rounded[0].unique()) <= 1 << bits


def test_rounding_is_refused_where_it_cannot_be_exact(tmp_path):
    for settings, bits in product(({"exact": False}, {"kv_bits": 8}), (4, 8)):
        with pytest.raises(ConfigError, match=rf"cannot be rounded to {bits} bits: they need"):
            load(tmp_path, None, LoadConfig(device="cpu", bits=bits, **settings))


def test_shortlists_read_rows_of_the_packed_head(model):
    target, tokens = model.backend.target, torch.tensor([3, 200, 264])
    hidden = torch.randn(2, 32).bfloat16()
    with torch.inference_mode():
        expected = target.logits(hidden)[:, tokens]
        assert torch.equal(target.shortlist_logits(hidden, tokens), expected)
        each = target.shortlist_logits(hidden, torch.stack([tokens, tokens + 0]))
    assert torch.equal(each, expected)
