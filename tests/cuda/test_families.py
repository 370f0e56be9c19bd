"""Model types of transformers that are unlike others, and what the backend refuses to load.

Layers, caches or positions are unlike others'. One test is of the reference's windows, where
configurations leave something unsaid.
"""

import logging
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partialmethod

import numpy as np
import pytest
from adapters import ones, write_adapter
from byte_tokens import save_tokenizer
from parts import load_with_parts, use_models
from recordings import recording
from stand_ins import stand_in

import treeflash
from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler, backend_base, decode
from treeflash.decoding.interfaces import Prefill, TableOptions
from treeflash.decoding.probe import tree_difference
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.errors import CheckpointError, ConfigError, PromptError, UnsupportedModelError
from treeflash.reference.target import Target
from treeflash.testing import require
from treeflash.testing.comparisons import generate, random_tokens
from treeflash.testing.models import edit_config, save, write_drafter, write_pair, write_target

require("torch")

import torch
from families import cuda as families
from families import write_pair as write_family_pair
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DogeConfig
from transformers.models.starcoder2 import modeling_starcoder2
from transformers.utils import logging as transformers_logging
from treeflash_cuda import exact
from treeflash_cuda.backend import load
from treeflash_cuda.cpu import low_bit_loading
from treeflash_cuda.hf import model_target
from treeflash_cuda.hf.attention_contexts import is_attending
from treeflash_cuda.hf.model_target import add_adapter, load_model
from treeflash_cuda.target import read_model_config
from treeflash_cuda.verifier import FIRST_CHUNK

pytestmark = pytest.mark.sample(1)

CPU = LoadConfig(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def capped(tmp_path_factory):
    """Pairs whose scores are soft-capped or have sinks, and transformers' models of the targets."""
    pairs = {}
    for name in ("gemma2", "gpt_oss"):
        target, drafter = (tmp_path_factory.mktemp(name) for _ in range(2))
        model = families.write(target, name)
        write_drafter(drafter, target, seed=2)
        pairs[name] = model, target, drafter
    return pairs


@pytest.mark.parametrize(
    ("name", "operations", "reads_cache"),
    [
        ("gemma3n_text", False, True),  # its last layers share keys and values of earlier ones
        ("gemma3n_text", True, True),
        ("jetmoe", False, False),  # repeats keys in another order than others
        ("jetmoe", True, False),
        ("diffllama", True, False),  # attends twice, with other values
    ],
)
def test_layers_attend_to_keys_that_they_share_or_change(
    tmp_path, name, operations, reads_cache, monkeypatch
):
    """In trees alone and side by side."""
    model = families.write(tmp_path, name)
    backend = load_with_parts(monkeypatch, tmp_path) if operations else load(tmp_path, None, CPU)
    assert backend.target.reads_cache == reads_cache
    prompts = [random_tokens(np.random.default_rng(n), 96, n) for n in (20, 3)]
    tree = DraftTree.from_parents(np.array([5, 6, 7, 8]), np.array([-1, 0, 0, 1], np.int32))
    states = [backend.open(60, drafts=False) for _ in prompts]
    backend.verifier.run([Prefill(*x, None) for x in zip(states, prompts, strict=True)])
    together = backend.verifier.logits([(state, tree) for state in states]).logits
    for state, prompt, found in zip(states, prompts, together, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([[*prompt, 5, 6, 8]])).logits[0, -1].numpy()
        (alone,) = backend.verifier.logits([(state, tree)]).logits
        np.testing.assert_allclose(found[3], expected, atol=1e-4 * expected.std())
        np.testing.assert_allclose(alone[3], expected, atol=1e-4 * expected.std())
    # PyTorch has another kernel for fewer than 4,096 multiplications, as only a tiny model has.
    stand_in(monkeypatch, exact, CANCELLED_WEIGHTS=0)
    half = load(tmp_path, None, LoadConfig(device="cpu", dtype="bfloat16"))
    reason = "does not attend to the keys that it stores" if reads_cache else "change what they"
    assert reason in half.inexact


@pytest.mark.parametrize(
    ("name", "variant"), [("gemma2", "soft-capped scores"), ("gpt_oss", "attention sinks")]
)
def test_variants_of_attention_have_no_exact_mode_on_a_cpu(capped, name, variant, monkeypatch):
    use_models(monkeypatch)
    _, target, drafter = capped[name]
    reason = f"it does not support {variant}"
    assert reason in load(target, drafter, LoadConfig(device="cpu", dtype="bfloat16")).inexact
    with pytest.raises(UnsupportedModelError, match=reason):
        load(target, drafter, LoadConfig(device="cpu", dtype="bfloat16", exact=True))


@pytest.mark.sample(2)
@pytest.mark.parametrize("operations", [False, True], ids=["masks", "operations"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_soft_capped_scores_and_sinks_are_those_of_transformers(
    capped, name, operations, monkeypatch
):
    """In prompts of one and of several chunks, in trees, alone and side by side."""
    model, target, drafter = capped[name]
    if operations:
        backend = load_with_parts(monkeypatch, target, drafter)
    else:
        use_models(monkeypatch)
        backend = load(target, drafter, CPU)
    assert (backend.target.softcap is None, backend.target.has_sinks) == (
        (False, False) if name == "gemma2" else (True, True)
    )
    assert tree_difference(backend, np.random.default_rng(0), 24) < 1e-4
    config = DecodeConfig(budget=6, max_tokens=8, suffix=False)
    prompts = [random_tokens(np.random.default_rng(n), 96, n) for n in (300, 30)]
    expected = []
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        settings = {"attention_mask": torch.ones_like(inputs), "eos_token_id": None}
        with torch.inference_mode():
            text = model.generate(inputs, max_new_tokens=8, do_sample=False, **settings)
        expected.append(text[0, len(prompt) :].tolist())
    requests = [Request(prompt_ids=prompt, config=config) for prompt in prompts]
    for chunk in (FIRST_CHUNK, 270):
        backend.verifier.first_chunk = chunk
        tokens: list[list[int]] = [[], []]
        for request, step in Scheduler(backend).decode(requests):
            tokens[requests.index(request)] += step.tokens
        assert tokens == expected


def test_a_model_may_use_its_cache_as_in_earlier_versions(tmp_path, monkeypatch):
    """Before transformers 5.24 it had another name, and was asked otherwise for earlier states."""
    model = families.write(tmp_path, "mamba2")
    forward = type(model).forward

    def earlier_forward(self, input_ids=None, cache_params=None, **kwargs):
        if cache_params is not None:
            assert not cache_params.has_previous_state()
        return forward(self, input_ids, cache=cache_params, **kwargs)

    stand_in(monkeypatch, type(model), forward=earlier_forward)
    backend = load(tmp_path, None, CPU)
    assert backend.target.states_nbytes > 0


POSITIONS = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": POSITIONS,
}


@pytest.fixture(scope="module", params=["a table of positions", "frequencies by the last position"])
def backend(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    if request.param.startswith("a table"):
        name, fields = "opt", {"max_position_embeddings": POSITIONS, "ffn_dim": 64}
    else:
        positions = {"original_max_position_embeddings": POSITIONS, "rope_parameters": LONGROPE}
        name, fields = "phi3", positions | {"max_position_embeddings": 4 * POSITIONS}
    return load(*write_family_pair(families, folder, name, **fields), CPU)


def test_texts_that_reach_the_last_position_are_those_of_plain_decoding(backend):
    assert backend.max_positions == POSITIONS
    for first in (3, 5):
        prompt = list(range(first, first + 5))
        plain = generate(backend, prompt, DecodeConfig(method="ar"))
        assert len(plain) == POSITIONS - len(prompt)
        for method in ("dflash", "ddtree", "treeflash"):
            config = DecodeConfig(method=method, budget=32)
            assert generate(backend, prompt, config) == plain, method


def test_longer_prompts_are_refused(backend):
    with pytest.raises(PromptError, match=f"the target's limit is {POSITIONS}"):
        decode(backend, Request(prompt_ids=[5] * POSITIONS, config=DecodeConfig(method="ar")))


WINDOWS = {
    "qwen2 slides from a layer on": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3 slides from a layer on": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3_moe slides everywhere": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6}),
    "a window that is not used": ("qwen2", {"use_sliding_window": False, "sliding_window": 6}),
    "mistral slides": ("mistral", {"sliding_window": 6}),
    "mistral told not to": ("mistral", {"sliding_window": None}),
    "layers named one by one": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}


@pytest.mark.sample(None)
@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_those_of_transformers(case, tmp_path):
    family, settings = WINDOWS[case]
    write_target(tmp_path, family, seed=1)
    edit_config(tmp_path, lambda config: config.update(settings))
    tokens = np.random.default_rng(2).integers(0, 24, 20).astype(np.int32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    target = Target(tmp_path)
    positions = np.arange(20, dtype=np.int32)
    logits, _ = target.forward(tokens, positions, np.tri(20, dtype=np.bool_), target.new_cache())
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.sample(None)
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
    stand_in(monkeypatch, transformers_logging, _tqdm_active=bars)
    try:
        load_model(tmp_path, read_model_config(tmp_path), None, torch.device("cpu"))
        assert transformers_logging.is_progress_bar_enabled() == bars
    finally:
        log.removeHandler(handler)
    assert not [x for x in records if "eh_proj" in x.getMessage()]


def test_rounded_drafters_are_refused_where_a_cpu_has_no_products(tmp_path, monkeypatch):
    stand_in(monkeypatch, low_bit_loading, find_spec=lambda name: None)
    with pytest.raises(ConfigError, match="cannot be rounded to 4 bits: llvmlite is not installed"):
        load(tmp_path, None, LoadConfig(device="cpu", draft_bits=4))


def test_keys_in_8_bits_need_heads_of_whole_words(tmp_path):
    write_target(tmp_path, "llama", seed=1, hidden_size=24)
    with pytest.raises(ConfigError, match="multiple of 4, but llama has heads of width 6"):
        load(tmp_path, None, replace(CPU, kv_bits=8))


# A C++ compiler takes seconds. `test_decoder.py` compares compiled layers with transformers.
@pytest.mark.nightly
def test_compiled_layers_compute_the_same(tmp_path, monkeypatch):
    folders = write_pair(tmp_path, "qwen3", drafter={"target_layer_ids": (0,)}, layers=1)
    # Tracing, but no compiler of C++.
    stand_in(monkeypatch, nn.Module, compile=partialmethod(nn.Module.compile, backend="eager"))
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
        stand_in(monkeypatch, model_target, load_model=loader)
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

    stand_in(monkeypatch, AutoModelForCausalLM, from_pretrained=from_pretrained)
    device = torch.device("cuda", 1)
    with pytest.raises(CheckpointError, match="enough"):
        load_model(tmp_path, read_model_config(tmp_path), None, device)
    assert given["device_map"] == {"": device}


def patch_attention(monkeypatch, folder, change):
    """Write a model of transformers whose layers get the mask that `change` makes of theirs."""
    families.write(folder, "starcoder2")
    layer = modeling_starcoder2.Starcoder2Attention
    forward = layer.forward

    def call(self, *args, attention_mask, **options):
        mask = None if attention_mask is None else change(attention_mask)
        return forward(self, *args, attention_mask=mask, **options)

    stand_in(monkeypatch, layer, forward=call)


def test_layers_that_attend_without_a_mask_are_refused(tmp_path, monkeypatch):
    patch_attention(monkeypatch, tmp_path, lambda _: None)
    with pytest.raises(UnsupportedModelError, match=r"^starcoder2 models compute attention in a"):
        load(tmp_path, None, CPU)


def test_logits_that_only_the_replaced_attention_loses_are_refused(tmp_path, monkeypatch):
    families.write(tmp_path, "starcoder2")
    layer = modeling_starcoder2.Starcoder2Attention
    forward = layer.forward

    def lose(self, *args, **options):
        output, weights = forward(self, *args, **options)
        return output * torch.nan if is_attending() else output, weights

    stand_in(monkeypatch, layer, forward=lose)
    with pytest.raises(UnsupportedModelError, match=r"^starcoder2 .* of the logits: inf"):
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


@pytest.mark.sample(None)
@pytest.mark.parametrize("method", [None, "modelopt"])
def test_quantised_weights_whose_scales_are_not_read_are_refused(method, tmp_path):
    """As NVIDIA publishes them: `hf_quant_config.json` describes them, or a method of its own."""
    write_target(tmp_path, "llama", seed=1)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [name for name in stored if "_proj." in name]:
        scale = stored[name].abs().max() / 448
        stored[name] = (stored[name] / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale"] = scale
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if method is not None:
        scheme = {"quantization_config": {"quant_method": method, "quant_algo": "FP8"}}
        edit_config(tmp_path, lambda config: config.update(scheme))
    with pytest.raises(UnsupportedModelError, match=r"read their scales \(model\..*weight_scale\)"):
        load(tmp_path, None, CPU)


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.9.mlp.up_proj", (8, 32), r"no linear layer of this name and shape \(8, 32"),
        ("model.layers.0.mlp.up_proj", (8, 64), r"no linear layer of this name and shape \(8, 64"),
        ("model.embed_tokens", (96, 64), "it is quantised, or no linear layer"),
    ],
)
def test_an_adapter_of_other_layers_is_refused(tmp_path, name, shape, reason):
    model = families.write(tmp_path / "model", "llama")
    write_adapter(tmp_path, {name: ones(*shape)})
    with pytest.raises(UnsupportedModelError, match=f"cannot be merged into {name}: .*{reason}"):
        add_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("kv_heads", "reason"),
    [(4, "compute attention in a way"), (2, "has a mask for each query head")],
)
def test_custom_attention_is_refused(tmp_path, kv_heads, reason):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": kv_heads}
    config = DogeConfig(**sizes, vocab_size=32, keep_window_size=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"doge.* {reason}"):
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
        load(target, drafter, CPU)
    assert len(checks) == 4
