"""What the PyTorch backend refuses to load, and how it says so."""

import logging
import sys
from contextlib import suppress
from functools import partialmethod

import numpy as np
import pytest
from adapters import ones, write_adapter
from byte_tokens import save_tokenizer
from recordings import recording

import treeflash
from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import backend_base
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.errors import CheckpointError, ConfigError, UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import edit_config, save, write_pair, write_target

require("torch")

import torch
from families import cuda as families
from parts import load_with_parts, use_models
from torch import nn
from transformers import AutoModelForCausalLM, DogeConfig, LlamaConfig
from transformers.models.starcoder2 import modeling_starcoder2
from transformers.utils import logging as transformers_logging
from treeflash_cuda.backend import load
from treeflash_cuda.cpu import low_bit_loading
from treeflash_cuda.hf import model_target
from treeflash_cuda.hf.model_target import add_adapter, load_model
from treeflash_cuda.target import read_model_config

CPU = LoadConfig(device="cpu")


@pytest.mark.parametrize("bars", [True, False])
def test_tensors_of_an_mtp_head_print_no_table(tmp_path, monkeypatch, bars):
    write_target(tmp_path, "llama", seed=0)
    head = {"model.layers.4.eh_proj.weight": np.zeros((2, 2), np.float32)}
    save(tmp_path, read_config(tmp_path), read_tensors(tmp_path) | head)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    log = logging.getLogger("transformers")
    log.addHandler(handler)
    monkeypatch.setattr(transformers_logging, "_tqdm_active", bars)
    try:
        load_model(tmp_path, read_model_config(tmp_path), None, torch.device("cpu"))
        assert transformers_logging.is_progress_bar_enabled() == bars
    finally:
        log.removeHandler(handler)
    assert not [x for x in records if "eh_proj" in x.getMessage()]


def test_rounded_drafters_are_refused_where_a_cpu_has_no_products(tmp_path, monkeypatch):
    monkeypatch.setattr(low_bit_loading, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="cannot be rounded to 4 bits: llvmlite is not installed"):
        load(tmp_path, None, LoadConfig(device="cpu", draft_bits=4))


# A C++ compiler takes seconds. `test_decoder.py` compares compiled layers with transformers.
@pytest.mark.nightly
def test_compiled_layers_compute_the_same(tmp_path, monkeypatch):
    folders = write_pair(tmp_path, "qwen3", drafter={"target_layer_ids": (0,)}, layers=1)
    # Tracing, but no compiler of C++.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    texts = []
    for compiled in (False, True):
        config = LoadConfig(device="cpu", dtype="float32", compile=compiled)
        backend = load(*folders, config)
        texts.append(generate(backend, [3, 4, 5], DecodeConfig(budget=8, max_tokens=6)))
    assert texts[0] == texts[1]


class QuantisedHead(nn.Module):
    """An output head as quantising packages make them: its weight is of another dtype."""

    def __init__(self, linear):
        super().__init__()
        self.linear = [linear]
        self.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return self.linear[0](x)


def test_the_output_head_may_be_quantised(tmp_path, monkeypatch):
    folders = write_pair(tmp_path, "qwen3")
    use_models(monkeypatch)

    def load_quantised(*args, **settings):
        model = load_model(*args, **settings)
        model.set_output_embeddings(QuantisedHead(model.get_output_embeddings()))
        return model

    tables = []
    for loader in (load_model, load_quantised):
        monkeypatch.setattr(model_target, "load_model", loader)
        backend = load(*folders, CPU)
        assert (backend.target.lm_head_weight is None) == (loader is load_quantised)
        text = SequenceSession(backend, drafts=True)
        blocks = [text.draft(text.extend([3, 4, 5]))]
        options = TableOptions(m=4, k=4, shortlist=16, rows=7)
        (table,) = backend.head.transitions(blocks, options)
        tables.append(table.tokens)
    np.testing.assert_array_equal(*tables)


def test_models_are_loaded_straight_to_their_device(tmp_path, monkeypatch):
    """A quantised model must not be moved, and others would be in memory twice."""
    write_target(tmp_path, "qwen3", seed=1)
    given = {}

    def from_pretrained(folder, **settings):
        given.update(settings)
        raise OSError("enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    device = torch.device("cuda", 1)
    with pytest.raises(CheckpointError, match="enough"):
        load_model(tmp_path, read_model_config(tmp_path), None, device)
    assert given["device_map"] == {"": device}


TINY = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def patch_attention(monkeypatch, folder, change):
    """Write a model of transformers whose layers get the mask that `change` makes of theirs."""
    families.write(folder, "starcoder2")
    layer = modeling_starcoder2.Starcoder2Attention
    forward = layer.forward

    def call(self, *args, attention_mask, **options):
        mask = None if attention_mask is None else change(attention_mask)
        return forward(self, *args, attention_mask=mask, **options)

    monkeypatch.setattr(layer, "forward", call)


def test_layers_that_attend_without_a_mask_are_refused(tmp_path, monkeypatch):
    patch_attention(monkeypatch, tmp_path, lambda _: None)
    with pytest.raises(UnsupportedModelError, match=r"^starcoder2 models compute attention in a"):
        load(tmp_path, None, CPU)


def test_layers_that_change_their_mask_have_no_exact_mode_and_no_graphs(tmp_path, monkeypatch):
    patch_attention(monkeypatch, tmp_path, torch.clone)
    with pytest.raises(UnsupportedModelError, match="Starcoder2Attention changes its mask"):
        load(tmp_path, None, LoadConfig(device="cpu", dtype="bfloat16", exact=True))
    reason = "without CUDA graphs: Starcoder2Attention changes its mask"
    with pytest.warns(UserWarning, match=reason):
        session = SequenceSession(load_with_parts(monkeypatch, tmp_path))
    with suppress(UnsupportedModelError):
        session.logits(DraftTree.root_only(3))


def test_weights_that_cannot_be_joined_are_one_line(tmp_path):
    write_target(tmp_path, "qwen3_moe", seed=1)
    edit_config(tmp_path, lambda config: config.update(hidden_act="gelu"))
    tensors = read_tensors(tmp_path)
    del tensors["model.layers.1.mlp.experts.1.up_proj.weight"]
    save(tmp_path, read_config(tmp_path), tensors)
    message = "cannot be loaded: its weights do not have the form that its configuration asks for$"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, None, CPU)


def test_a_package_that_quantised_weights_need_is_named(tmp_path, monkeypatch):
    write_target(tmp_path, "llama", seed=1)
    scheme = {"quantization_config": {"quant_method": "torchao", "quant_type": "int8_weight_only"}}
    edit_config(tmp_path, lambda config: config.update(scheme))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UnsupportedModelError, match=r"a package that is not installed \(.*torchao"):
        load(tmp_path, None, CPU)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.9.mlp.up_proj", (8, 32), r"no linear layer of this name and shape \(8, 32"),
        ("model.layers.0.mlp.up_proj", (8, 32), r"no linear layer of this name and shape \(8, 32"),
        ("model.embed_tokens", (32, 32), "it is quantised, or no linear layer"),
    ],
)
def test_an_adapter_of_other_layers_is_refused(tmp_path, name, shape, reason):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    write_adapter(tmp_path, {name: ones(*shape)})
    with pytest.raises(UnsupportedModelError, match=f"cannot be merged into {name}: .*{reason}"):
        add_adapter(model, tmp_path)


def test_custom_attention_is_refused(tmp_path):
    config = DogeConfig(**TINY | {"num_attention_heads": 4}, keep_window_size=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="doge models compute attention in a way"):
        load(tmp_path, None, CPU)


def test_a_pair_that_passed_its_checks_is_not_checked_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path / "cache"))
    target, drafter = write_pair(tmp_path, "qwen3")
    save_tokenizer(target)
    weights = target / "model.safetensors"

    def load_pair(**settings):
        treeflash.load(target, drafter, backend="cuda", device="cpu", **settings)

    with recording(backend_base, "check_trees") as checks:
        load_pair(dtype="float32")
        load_pair(dtype="float32")
        load_pair(dtype="bfloat16", exact=False)
        assert [backend.dtype for (backend,) in checks] == ["float32", "bfloat16"]
        weights.write_bytes(weights.read_bytes())
        load_pair(dtype="float32")
        load(target, drafter, LoadConfig(device="cpu", dtype="float32"))
    assert len(checks) == 4
