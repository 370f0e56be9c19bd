"""DFlash (arXiv 2602.06036): a Qwen3-like backbone that fills in a block of mask tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treeflash.config import DrafterConfig
from treeflash.drafters.rope import inverse_frequencies, rope_parameters

SECTIONS = ("dflash_config", "treeflash_config")
"""Where a `config.json` may hold a drafter's own settings; the top level is searched last."""
LAYER_TYPES = ("full_attention", "sliding_attention")


def setting(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A drafter's setting, from whichever section of its `config.json` holds it."""
    sections = [dict(config.get(name) or {}) for name in SECTIONS]
    return next((section[key] for section in (*sections, config) if key in section), default)


def parse_config(config: Mapping[str, Any], *, head: str | None = None) -> DrafterConfig:
    """The drafter that a DFlash configuration describes.

    Args:
        config: the content of `config.json`.
        head: name of the AR head, if the format has one.

    Raises:
        KeyError: a setting is missing.
        TypeError: a setting has the wrong type.
        ValueError: a setting has a value that is not supported.
        CheckpointError: the rotary settings are not supported.
    """
    for key, neutral in (("output_multiplier", 1.0), ("final_logit_softcapping", None)):
        if setting(config, key, neutral) != neutral:
            raise ValueError(f"{key} is not supported")
    layers = int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    hidden_size = int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden_size // heads)
    target_layers = config.get("num_target_layers")
    layer_ids = setting(config, "target_layer_ids")
    if layer_ids is None:
        layer_ids = default_target_layer_ids(int(config["num_target_layers"]), layers)
    block_size = int(setting(config, "block_size", 16))
    if block_size < 2:
        raise ValueError(f"block_size must be 2 or more, got {block_size}")
    mask_token_id = setting(config, "mask_token_id")
    if mask_token_id is None:
        raise KeyError("mask_token_id")
    inv_freq, rope_scale = inverse_frequencies(rope_parameters(config), head_dim)
    sliding = _sliding_layers(config, layers)
    window = int(config["sliding_window"]) if any(sliding) else None
    # The published code makes sliding layers causal unless the checkpoint says otherwise.
    causal = config.get("is_causal")
    return DrafterConfig(
        hidden_size=hidden_size,
        intermediate_size=int(config["intermediate_size"]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        rms_norm_eps=float(config["rms_norm_eps"]),
        attention_bias=bool(config.get("attention_bias", False)),
        block_size=block_size,
        mask_token_id=int(mask_token_id),
        target_layer_ids=tuple(int(i) for i in layer_ids),
        num_target_layers=None if target_layers is None else int(target_layers),
        vocab_size=None if config.get("vocab_size") is None else int(config["vocab_size"]),
        head=head,
        inv_freq=tuple(inv_freq.tolist()),
        rope_scale=rope_scale,
        sliding_windows=tuple(window if slides else None for slides in sliding),
        causal=tuple(slides if causal is None else bool(causal) for slides in sliding),
        input_scale=float(setting(config, "input_embedding_scale", 1.0)),
    )


def default_target_layer_ids(num_target_layers: int, num_hidden_layers: int) -> tuple[int, ...]:
    """The target layers that DFlash takes features from if a checkpoint names none."""
    if num_hidden_layers == 1:
        return (num_target_layers // 2,)
    step = (num_target_layers - 4) / (num_hidden_layers - 1)
    return tuple(round(1 + i * step) for i in range(num_hidden_layers))


def backbone_shapes(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a backbone's tensors, by canonical name."""
    h, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (h, len(config.target_layer_ids) * h),
        "hidden_norm.weight": (h,),
        "norm.weight": (h,),
    }
    for n in range(config.num_hidden_layers):
        layer = f"layers.{n}."
        for name, (rows, columns) in {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, columns)
            if config.attention_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes |= {
            f"{layer}self_attn.q_norm.weight": (d,),
            f"{layer}self_attn.k_norm.weight": (d,),
            f"{layer}mlp.gate_proj.weight": (i, h),
            f"{layer}mlp.up_proj.weight": (i, h),
            f"{layer}mlp.down_proj.weight": (h, i),
            f"{layer}input_layernorm.weight": (h,),
            f"{layer}post_attention_layernorm.weight": (h,),
        }
    return shapes


def _sliding_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Per layer, whether its attention has a sliding window."""
    kinds = config.get("layer_types") or ["full_attention"] * layers
    if len(kinds) != layers:
        raise ValueError(f"layer_types lists {len(kinds)} layers, num_hidden_layers is {layers}")
    for kind in kinds:
        if kind not in LAYER_TYPES:
            raise ValueError(
                f"layer type {kind!r} is not supported; known types are {', '.join(LAYER_TYPES)}"
            )
    return tuple(kind == "sliding_attention" for kind in kinds)
