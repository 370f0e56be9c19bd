"""Settings of configurations by the names that mlx-lm reads."""

import json

import pytest

from treeflash.drafters.folder import read_config
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from mlx import nn
from transformers import CONFIG_MAPPING, AutoConfig
from treeflash_mlx.target import ACTIVATIONS, Target, compatible_settings, refuse_ignored_activation

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
