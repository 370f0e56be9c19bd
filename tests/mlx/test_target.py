"""Targets on MLX: hooks, quantised keys, output heads, batches, and settings by mlx-lm's names."""

import json

import numpy as np
import pytest
from recordings import recording

from treeflash.config import LoadConfig
from treeflash.decoding.probe import relative_difference
from treeflash.decoding.session import SequenceSession
from treeflash.drafters.folder import read_config
from treeflash.errors import CheckpointError, ConfigError, UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.comparisons import random_tokens, random_tree

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from engines.mlx import plain_model
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ChunkedKVCache, KVCache
from transformers import CONFIG_MAPPING, AutoConfig
from treeflash_mlx.backend import load
from treeflash_mlx.target import (
    ACTIVATIONS,
    CacheLayout,
    Target,
    compatible_settings,
    refuse_ignored_activation,
    shortlist_logits,
)


def test_a_cache_of_another_kind_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"^llama4 models keep a ChunkedKVCache, which"):
        CacheLayout("llama4", [KVCache(), ChunkedKVCache(8)])


def test_attention_that_cannot_read_quantised_keys_is_refused(families, tmp_path, monkeypatch):
    monkeypatch.setitem(families.OVERRIDES, "plamo2", {"hidden_size_per_head": 32})
    families.write(tmp_path, "plamo2")
    with pytest.raises(ConfigError, match=r"^kv_bits is not supported for plamo2 models"):
        load(tmp_path, None, LoadConfig(kv_bits=8))


@pytest.mark.parametrize("dtype", [mx.int8, mx.uint8])  # FP8 has no type of its own in MLX
def test_integers_are_not_read_as_weights(families, tmp_path, dtype):
    families.write(tmp_path, "qwen3")
    file = str(tmp_path / "model.safetensors")
    weights = mx.load(file)
    name = "model.layers.0.mlp.up_proj.weight"
    mx.save_safetensors(file, {**weights, name: weights[name].astype(dtype)}, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"without the scales that MLX reads, such as {name}"):
        load(tmp_path, None, LoadConfig())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_hooks_belong_to_one_model(families, tmp_path, family):
    """Its parameters and modules keep their names; others of its classes compute as before."""
    families.write(tmp_path, family)
    plain, tokens = plain_model(tmp_path), mx.array([[1, 2, 3, 4]])
    before = plain(tokens)
    hooked = load(tmp_path, None, LoadConfig()).target.model
    names = [[name for name, _ in tree_flatten(m.parameters())] for m in (plain, hooked)]
    assert names[0] == names[1]
    assert [name for name, _ in plain.named_modules()] == [n for n, _ in hooked.named_modules()]
    for model in (plain, hooked, plain_model(tmp_path)):
        assert mx.array_equal(model(tokens), before)
    hooks = zip(plain.modules(), hooked.modules(), strict=True)
    assert any(type(own) is not type(other) for own, other in hooks)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_shortlist_logits_are_those_of_the_whole_vocabulary(families, tmp_path, rng, family):
    """With the bias that some output heads have."""
    families.write(tmp_path, family)
    target = Target(tmp_path, mx.float32, None)
    assert ("bias" in target.lm_head) == (family == "phi")
    hidden = mx.array(rng.normal(size=(3, 64)), mx.float32)
    tokens = mx.array([5, 0, 90])
    expected = target.output_head(hidden)[:, tokens]
    assert mx.allclose(shortlist_logits(target.output_module, hidden, tokens), expected, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_shortlist_logits_of_a_quantised_head_are_products_of_its_rows_alone(
    rng, monkeypatch, bits, batch
):
    """The rows are not dequantised, which would take more memory traffic than the product."""
    head = nn.Linear(64, 96, bias=True).to_quantized(32, bits)
    hidden = mx.array(rng.normal(size=(*batch, 3, 64)), mx.float32)
    tokens = mx.array(rng.integers(0, 96, (*batch, 5)))
    monkeypatch.setattr(mx, "dequantize", None)
    found = shortlist_logits(head, hidden, tokens)
    assert found.shape == (*batch, 3, 5)
    columns = mx.broadcast_to(tokens[..., None, :], found.shape)
    assert mx.allclose(found, mx.take_along_axis(head(hidden), columns, -1), atol=1e-4)


@pytest.mark.sample(1)
@pytest.mark.parametrize("wide", [False, True])
def test_chunks_of_wide_heads_keep_their_scores_small(pair, rng, wide):
    """MLX has the scores of such heads in memory; a long context would make them gigabytes."""
    backend, chunk = load(pair[0], None, LoadConfig()), 128
    backend.verifier.chunk, backend.verifier.wide_columns = chunk, 2 * chunk
    if wide:
        backend.verifier.wide_head = backend.target.head_dim
    tokens = random_tokens(rng, 64, 6 * chunk)
    sequence = SequenceSession(backend, capacity=7 * chunk)
    with recording(backend.target, "forward") as passes:
        sequence.extend(tokens)
    sizes = [token_ids.shape[1] for token_ids, *_ in passes]
    assert sizes[:2] == [chunk] * 2
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == len(tokens)
    columns = np.cumsum(sizes)
    assert (max(sizes * columns) <= 2 * chunk * chunk) == wide


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("family", "batches"),
    [
        *(("gemma3_text", True), ("deepseek_v3", True), ("gemma3n", True)),
        *(("gemma2", False), ("gpt2", False), ("ministral3", False)),
    ],
)
def test_sequences_run_one_by_one_if_the_family_needs_it(families, tmp_path, rng, family, batches):
    """Gemma 2 adds the mask to five axes, GPT-2 and Ministral 3 have one offset for all rows."""
    families.write(tmp_path, family)
    backend = load(tmp_path, None, LoadConfig())
    assert backend.target.batches == batches
    sequences = [SequenceSession(backend) for _ in range(3)]
    # Ministral 3 scales its queries from position 64 on.
    for sequence, length in zip(sequences, (3, 70, 11), strict=True):
        sequence.extend(rng.integers(0, 96, length).tolist())
    nodes = (1, 1, 1) if family == "gpt2" else (5, 30, 1)
    trees = [random_tree(rng, 1, n, 96) for n in nodes]
    states = [sequence.state for sequence in sequences]
    together = backend.verifier.logits(list(zip(states, trees, strict=True))).logits
    for sequence, tree, logits in zip(sequences, trees, together, strict=True):
        np.testing.assert_allclose(logits, sequence.logits(tree), atol=2e-4)


def test_layers_with_quantised_keys_may_attend_twice_with_the_same_queries(families, tmp_path, rng):
    """mlx-lm scales these queries in place."""
    families.write(tmp_path, "iquestloopcoder", head_dim=32)
    exact, quantised = (load(tmp_path, None, LoadConfig(kv_bits=bits)) for bits in (None, 8))
    for nodes in (1, 5):
        tree, found = random_tree(rng, 7, nodes, 96), []
        for backend in (exact, quantised):
            with SequenceSession(backend) as sequence:
                sequence.extend(list(range(20)))
                found.append(sequence.logits(tree)[-1])
        assert relative_difference(*found) < 0.05


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
def test_one_offset_for_all_rows_is_noticed_in_half_precision(families, tmp_path, family):
    """Beside rounding, a wrong position is a small difference."""
    families.write(tmp_path, family)
    assert not load(tmp_path, None, LoadConfig(dtype="bfloat16")).target.batches


THETA = 12345.0


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "phi", "gpt_neox", "glm4"],
)
@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_theta"])
def test_old_and_new_rope_settings_give_the_same_base(tmp_path, family, old):
    """What transformers 5 saves, and what older files hold, give the same rotary base."""
    saved = AutoConfig.for_model(family)
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = {"rope_theta": THETA, "partial_rotary_factor": 0.5}
    config |= dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 64)
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    config |= {"head_dim": 16}
    config.pop("rope_parameters")
    if old:
        config |= {"rotary_emb_base": THETA, "rotary_pct": 0.5, **rope}
    else:
        config["rope_parameters"] = {"rope_type": "default", **rope}
    name = "llama" if family == "mistral" else family
    module = __import__(f"mlx_lm.models.{name}", fromlist=["Model"])
    model = module.Model(module.ModelArgs.from_dict({**config, **compatible_settings(config)}))
    bases = [m.base for _, m in model.named_modules() if isinstance(m, nn.RoPE)]
    assert bases == [THETA]


def test_rope_settings_by_layer_type():
    config = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    added = compatible_settings(config)
    assert added["rope_theta"] == 1e6
    assert added["rope_local_base_freq"] == 1e4
    assert added["rope_scaling"]["type"] == added["rope_scaling"]["rope_type"] == "linear"
    assert "rope_parameters" not in added


def test_existing_settings_stay_as_they_are():
    config = {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    assert not {"rope_theta", "rope_scaling", "rope_parameters"} & set(compatible_settings(config))
    inner = compatible_settings({"text_config": {"rope_theta": 5.0, "x": 1}})["text_config"]
    assert inner == {
        "rope_theta": 5.0,
        "x": 1,
        "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"},
    }


def test_activations_are_those_of_mlx_lm_or_refused(families):
    """What transformers computes by default, published models have too."""
    known = {name for types in ACTIVATIONS.values() for name in types.split()}
    aliases = {"qwen3_5_moe_text", "qwen3_5_text", "solar_open"}
    assert known - aliases <= set(families.model_types())
    for (setting, activation), types in ACTIVATIONS.items():
        for name in types.split():
            config = {setting: activation}
            if name in CONFIG_MAPPING and name != "pixtral":  # transformers' is its vision tower
                config[setting] = getattr(CONFIG_MAPPING[name]().get_text_config(), setting)
            refuse_ignored_activation({**config, "model_type": name})
            refuse_ignored_activation({"model_type": name, "text_config": config})
            for other in ({setting: "relu"}, {"text_config": {setting: "relu"}}):
                with pytest.raises(UnsupportedModelError, match=f"activation {activation}"):
                    refuse_ignored_activation({"model_type": name, **other})
    refuse_ignored_activation({"model_type": "nemotron-nas", "hidden_act": "relu"})
    refuse_ignored_activation({"model_type": "gemma", "hidden_act": "gelu"})


FULL, LINEAR = "full_attention", "linear_attention"


@pytest.mark.parametrize(
    ("kinds", "interval"),
    [([LINEAR, LINEAR, FULL] * 2, 3), ([LINEAR] * 4, 5), ([FULL] * 2, 1), ([LINEAR, FULL], 2)],
)
def test_the_interval_of_attention_follows_from_the_types_of_layers(kinds, interval):
    for name in ("qwen3_next", "qwen3_5_text"):
        config = {"model_type": name, "layer_types": kinds, "full_attention_interval": 9}
        assert compatible_settings(config)["full_attention_interval"] == interval
    outer = {"model_type": "qwen3_5", "text_config": config}
    assert compatible_settings(outer)["text_config"]["full_attention_interval"] == interval


def test_layers_in_an_order_that_mlx_lm_lacks_are_refused():
    config = {"model_type": "qwen3_next", "layer_types": [LINEAR, FULL, FULL]}
    with pytest.raises(UnsupportedModelError, match="every n-th layer"):
        compatible_settings(config)


def test_types_of_layers_and_sizes_have_the_names_of_mlx_lm():
    granite = {"model_type": "granitemoehybrid", "layer_types": [LINEAR, FULL, "mamba"]}
    assert compatible_settings(granite)["layer_types"] == ["mamba", "attention", "mamba"]
    assert compatible_settings(granite)["position_embedding_type"] == "nope"
    rotated = granite | {"position_embedding_type": "rope"}
    assert compatible_settings(rotated)["position_embedding_type"] == "rope"
    lfm2 = {"model_type": "lfm2", "layer_types": ["conv", FULL], "hidden_size": 64}
    assert compatible_settings(lfm2)["block_dim"] == 64


def test_files_of_transformers_load(families, tmp_path):
    """Their text models have types, and OLMo-Hybrid's norms names, that mlx-lm lacks."""

    def logits(folder):
        target = Target(folder, mx.float32, None)
        tokens = mx.array([[5, 17, 3, 22, 8]])
        return target.forward(tokens, [target.new_kv_cache(9)], ())[0]

    def copy(name, model_type, rename):
        folder = tmp_path / name
        families.write(folder, name)
        config, weights = read_config(folder), mx.load(str(folder / "model.safetensors"))
        (folder / "other").mkdir()
        config = config.get("text_config", config) | {"model_type": model_type}
        (folder / "other" / "config.json").write_text(json.dumps(config))
        weights = {rename(name): x for name, x in weights.items()}
        mx.save_safetensors(str(folder / "other" / "model.safetensors"), weights, {"format": "mlx"})
        return folder, folder / "other"

    def published(name):
        name = name.replace("input_layernorm", "attention_layer_norm")
        return name.replace("post_attention_layernorm", "feedforward_layer_norm")

    for folders in (
        copy("qwen3_5", "qwen3_5_text", lambda name: name.removeprefix("language_model.")),
        copy("olmo_hybrid", "olmo_hybrid", published),
    ):
        mine, theirs = map(logits, folders)
        assert mx.array_equal(mine, theirs)
