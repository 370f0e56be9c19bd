"""Targets in the formats of GPTQ, AWQ, compressed-tensors and MLX keep their bits on a CPU."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from low_bit_checkpoints import KINDS, Kind, write_low_bits
from parts import use_models

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_tensors
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import edit_config, write_target

require("torch")
require("llvmlite")

import torch
from torch import Tensor, nn
from treeflash_cuda.backend import load
from treeflash_cuda.cpu import low_bit_loading
from treeflash_cuda.cpu.decoder_target import CpuTarget
from treeflash_cuda.cpu.low_bit_loading import keeps_bits
from treeflash_cuda.decoder import plain_config
from treeflash_cuda.hf.model_target import ModelTarget
from treeflash_cuda.low_bit_linear import LowBitEmbedding, LowBitLinear
from treeflash_cuda.target import read_model_config
from treeflash_cuda.target_loading import own_layers

pytestmark = pytest.mark.usefixtures("own_cache")

CPU = LoadConfig(device="cpu")
FLOAT32 = LoadConfig(device="cpu", dtype="float32", exact=True)
UNPACKED = LoadConfig(device="cpu", dtype="float32", bits=16)


def lack_layers(monkeypatch):
    """Let no target have layers of our own."""
    for module in (low_bit_loading, plain_config):
        monkeypatch.setattr(module, "decoder_facts", lambda _: "it is a test")


def write(root: Path, kind: Kind) -> tuple[Path, Path]:
    """Write a target in a format, and one with the same weights in float32."""
    write_target(root / "plain", "qwen2", seed=0, hidden_size=64, layers=2, tied=kind.table)
    write_low_bits(root / "stored", root / "plain", kind)
    return root / "stored", root / "plain"


@torch.inference_mode()
def run(pair) -> Tensor:
    """Return the logits of 20 tokens."""
    tokens = DraftTree.chain(np.arange(20, dtype=np.int32))
    with closing(pair.open(20, drafts=False)) as state:
        return pair.verifier.forward([(state, tokens)], [True]).logits.parts[0].float()


def rows_of(layer: nn.Module) -> Tensor:
    """Dequantise a layer, or several that read the same input."""
    parts = [x for x in layer.modules() if isinstance(x, LowBitLinear)]
    return torch.cat([x.rows(torch.arange(x.shape[0])) for x in parts])


@pytest.mark.sample(6)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_checkpoint_keeps_its_bits(tmp_path, kind):
    stored, plain = write(tmp_path, kind)
    weights = {x: torch.from_numpy(y) for x, y in read_tensors(plain).items()}
    pair = load(stored, None, FLOAT32)
    assert pair.inexact is None
    assert isinstance(pair.target, CpuTarget)
    for number, layer in enumerate(pair.target.model.layers):
        place = f"model.layers.{number}"
        found = {
            ("self_attn", "q_proj", "k_proj", "v_proj"): layer.mixer.qkv,
            ("self_attn", "o_proj"): layer.mixer.o_proj,
            ("mlp", "gate_proj", "up_proj"): layer.network.gate_up,
            ("mlp", "down_proj"): layer.network.down,
        }
        for (part, *names), own in found.items():
            expected = [weights[f"{place}.{part}.{name}.weight"] for name in names]
            assert torch.equal(rows_of(own), torch.cat(expected))
    assert isinstance(pair.target.embeddings, LowBitEmbedding) == kind.table
    # The same weights in float32 differ by what the rounding of inputs changes.
    expected = run(load(plain, None, UNPACKED)).log_softmax(-1)
    actual = run(pair).log_softmax(-1)
    assert (expected.exp() * (expected - actual)).sum(-1).mean() < 0.01


@pytest.mark.sample(5)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_bits_of_16_are_the_weights_in_float32(tmp_path, kind):
    stored, plain = write(tmp_path, kind)
    pair = load(stored, None, UNPACKED)
    assert not any(isinstance(x, LowBitLinear) for x in pair.target.model.modules())
    assert torch.equal(run(pair), run(load(plain, None, UNPACKED)))


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["GPTQ", "GPTQ, act-order", "AWQ", "W8A8", "MLX, 4 bits"])
def test_texts_are_those_of_plain_decoding(tmp_path, name):
    stored, _ = write(tmp_path, KINDS[name])
    pair = load(stored, None, CPU)
    assert pair.dtype in ("bfloat16", "float32")
    for temperature in (0.0, 1.0):
        sampling = SamplingConfig(temperature=temperature, seed=3)
        settings = {"max_tokens": 40, "sampling": sampling}
        expected = generate(pair, [3, 7, 3], DecodeConfig(method="ar", **settings))
        for budget in (4, 16):
            config = DecodeConfig(method="suffix", budget=budget, **settings)
            assert generate(pair, [3, 7, 3], config) == expected


def test_adapters_are_left_to_transformers(tmp_path):
    """It has no layers for them, either, and says so."""
    stored, _ = write(tmp_path, KINDS["GPTQ"])
    settings, given = LoadConfig(adapter="adapter"), (torch.device("cpu"), torch.float32)
    config = read_model_config(stored)
    reason = own_layers(stored, config, settings, *given, pack=True, processes=1)
    assert reason == "adapters are not merged into weights of few bits"


def test_layers_with_the_same_input_are_one_module_where_their_formats_agree(tmp_path):
    for name, parts in {"GPTQ": 1, "GPTQ, act-order": 3}.items():
        stored, _ = write(tmp_path / name, KINDS[name])
        layer = load(stored, None, CPU).target.model.layers[0]
        assert sum(isinstance(x, LowBitLinear) for x in layer.mixer.qkv.modules()) == parts


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["GPTQ, act-order", "AWQ", "W4A16", "W8A8"])
def test_models_of_transformers_keep_their_bits(tmp_path, monkeypatch, name):
    stored, plain = write(tmp_path, KINDS[name])
    expected = run(load(plain, None, UNPACKED)).log_softmax(-1)
    use_models(monkeypatch)
    lack_layers(monkeypatch)
    pair = load(stored, None, FLOAT32)
    assert isinstance(pair.target, ModelTarget)
    assert pair.inexact is None
    layers = [x for x in pair.target.model.modules() if isinstance(x, LowBitLinear)]
    assert len(layers) == 2 * 7
    actual = run(pair).log_softmax(-1)
    assert (expected.exp() * (expected - actual)).sum(-1).mean() < 0.01


def test_models_of_transformers_lack_some_layers(tmp_path, monkeypatch):
    stored, _ = write(tmp_path / "mlx", KINDS["MLX, 4 bits"])
    other, _ = write(tmp_path / "gptq", KINDS["GPTQ"])
    assert keeps_bits(stored, on_cpu=True)
    assert not keeps_bits(stored, on_cpu=False)
    lack_layers(monkeypatch)
    assert not keeps_bits(stored, on_cpu=True)
    assert keeps_bits(other, on_cpu=True)
    edit_config(other, lambda c: c.update(num_hidden_layers=1))
    assert not keeps_bits(other, on_cpu=True)


def test_formats_that_are_not_read_run_as_before(tmp_path):
    """Here without the package that they need."""
    stored, _ = write(tmp_path, KINDS["AWQ"])
    edit_config(stored, lambda c: c["quantization_config"].update(version="gemv"))
    with pytest.raises(Exception, match="a package that is not installed"):
        load(stored, None, CPU)
