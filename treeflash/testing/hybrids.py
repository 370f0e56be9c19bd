"""Tiny targets with recurrent layers, made from those with attention alone.

Their configurations hold the settings that transformers reads and those that mlx-lm reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from treeflash.testing.weights import OUTWARD, Tensors, norm, normal

Config = dict[str, Any]
KERNEL = 4


def gated_delta_net(config: Config, tensors: Tensors, rng: np.random.Generator) -> Config:
    """Qwen3.5: every other layer is a gated delta net; laid out as the published folders."""
    h, layers = config["hidden_size"], config["num_hidden_layers"]
    key_heads, heads, key_dim, value_dim = 2, 4, 8, h // 4
    channels = 2 * key_heads * key_dim + heads * value_dim
    text = config | {
        "model_type": "qwen3_5_text",
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": value_dim,
        "linear_conv_kernel_dim": KERNEL,
        "full_attention_interval": 2,
        "layer_types": (["linear_attention", "full_attention"] * layers)[:layers],
        "rope_parameters": config["rope_parameters"]
        | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    }
    for n in range(layers):
        layer = f"model.layers.{n}."
        if n % 2 == 0:
            _drop_attention(tensors, layer)
            mixer = layer + "linear_attn."
            widths = {"qkv": channels, "z": heads * value_dim, "b": heads, "a": heads}
            tensors |= {f"{mixer}in_proj_{x}.weight": normal(rng, w, h) for x, w in widths.items()}
            tensors |= _recurrence(rng, mixer, channels, heads) | {
                mixer + "norm.weight": norm(rng, value_dim),
                mixer + "out_proj.weight": normal(rng, h, heads * value_dim, scale=OUTWARD),
            }
        else:
            q = layer + "self_attn.q_proj.weight"
            tensors[q] = normal(rng, 2 * len(tensors[q]), h)  # and a gate for each channel
    for name in list(tensors):
        tensor = tensors.pop(name)
        if name.endswith("norm.weight") and "linear_attn" not in name:
            tensor = tensor - 1
        tensors[name.replace("model.", "model.language_model.")] = tensor
    outer = ("architectures", "model_type", "tie_word_embeddings", "dtype")
    ids = ("bos_token_id", "eos_token_id")
    return {name: config[name] for name in (*outer, *ids)} | {"text_config": text}


def mamba_2(config: Config, tensors: Tensors, rng: np.random.Generator) -> Config:
    """Granite 4, dense: every other layer is Mamba-2."""
    h, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, state = 8, 8
    inner = 2 * h
    channels = inner + 2 * state
    for n in range(layers):
        layer = f"model.layers.{n}."
        gate, up = (tensors.pop(f"{layer}mlp.{x}_proj.weight") for x in ("gate", "up"))
        tensors[layer + "shared_mlp.input_linear.weight"] = np.concatenate([gate, up])
        down = tensors.pop(layer + "mlp.down_proj.weight")
        tensors[layer + "shared_mlp.output_linear.weight"] = down
        if n % 2 == 0:
            _drop_attention(tensors, layer)
            mixer = layer + "mamba."
            tensors |= _recurrence(rng, mixer, channels, heads) | {
                mixer + "in_proj.weight": normal(rng, inner + channels + heads, h),
                mixer + "conv1d.bias": normal(rng, channels),
                mixer + "D": normal(rng, heads),
                mixer + "norm.weight": norm(rng, inner),
                mixer + "out_proj.weight": normal(rng, h, inner, scale=OUTWARD),
            }
    return config | {
        "layer_types": (["mamba", "attention"] * layers)[:layers],
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_d_state": state,
        "mamba_d_conv": KERNEL,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_limit": [0.0, 1000.0],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": config["intermediate_size"],
        "position_embedding_type": "rope",
        "attention_multiplier": config["head_dim"] ** -0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


HYBRIDS: dict[str, Callable[[Config, Tensors, np.random.Generator], Config]] = {
    "qwen3_5": gated_delta_net,
    "granitemoehybrid": mamba_2,
}
"""Each changes tensors in place, and returns the configuration."""


def text_settings(config: Config) -> Config:
    """The settings of the language model in a target's `config.json`."""
    return {**config, **config.get("text_config", {})}


def _drop_attention(tensors: Tensors, layer: str) -> None:
    for name in [name for name in tensors if name.startswith(layer + "self_attn.")]:
        del tensors[name]


def _recurrence(rng: np.random.Generator, mixer: str, channels: int, heads: int) -> Tensors:
    """The convolution, and gates that forget about a quarter with every token."""
    return {
        mixer + "conv1d.weight": normal(rng, channels, 1, KERNEL, scale=0.5),
        mixer + "A_log": normal(rng, heads, scale=0.5) - 1,
        mixer + "dt_bias": normal(rng, heads, scale=0.5),
    }
