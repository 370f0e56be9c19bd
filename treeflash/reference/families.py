"""Settings and weights of model families in the form that the reference computes with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from treeflash.reference.numerics import Array

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_5", "granitemoehybrid")
RECURRENT_LAYERS = {"linear_attention", "mamba"}
MULTIPLIERS = "embedding_multiplier", "residual_multiplier", "logits_scaling"


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the language model in a `config.json`, with the outer model type."""
    return {**config, **config.get("text_config", {}), "model_type": config.get("model_type")}


def is_supported(config: Mapping[str, Any]) -> bool:
    """Whether the reference computes this variant of a family."""
    if config["model_type"] not in FAMILIES or config.get("hidden_act", "silu") != "silu":
        return False
    if config["model_type"] != "granitemoehybrid":
        return True
    plain = all(config.get(name) in (1, None) for name in MULTIPLIERS)
    return plain and not config.get("num_local_experts") and not config.get("mamba_proj_bias")


def recurrent_layers(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers are recurrent."""
    kinds = config.get("layer_types")
    if kinds is None and config["model_type"] == "qwen3_5":
        interval = int(config.get("full_attention_interval", 4))
        return [bool((n + 1) % interval) for n in range(layers)]
    return [kind in RECURRENT_LAYERS for kind in kinds or [""] * layers]


def plain_weights(config: Mapping[str, Any], weights: dict[str, Array]) -> dict[str, Array]:
    """Weights under the names of Llama, where a family has others."""
    if config["model_type"] == "qwen3_5":
        weights = {
            name.replace("model.language_model.", "model."): x for name, x in weights.items()
        }
        # All norms but those of recurrent layers store the distance of their weight from 1.
        return {
            name: x + np.float32(1)
            if name.endswith("norm.weight") and "linear_attn" not in name
            else x
            for name, x in weights.items()
        }
    if config["model_type"] == "granitemoehybrid":
        plain = {}
        for name, x in weights.items():
            layer, _, part = name.partition("shared_mlp.")
            if part == "input_linear.weight":
                plain[layer + "mlp.gate_proj.weight"], plain[layer + "mlp.up_proj.weight"] = (
                    np.split(x, 2)
                )
            else:
                plain[layer + "mlp.down_proj.weight" if part else name] = x
        return plain
    return weights
