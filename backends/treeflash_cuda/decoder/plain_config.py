"""The configuration of a target with layers of our own, read without transformers.

transformers takes a second to import what reads a configuration, and more for some model types. So
`config.json` is read directly where nothing is left to transformers: every setting that layers of
our own depend on is in it, in the plainest form. The files of most models are like this, and so
are the files that treeflash writes for GGUF files. Other files are read by transformers, which
knows what their missing settings mean, and what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from treeflash.drafters.folder import read_config
from treeflash_cuda.decoder.facts import DecoderFacts, decoder_facts
from treeflash_cuda.target import read_model_config

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
FLAGS = "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"
SETTINGS: dict[str, tuple[str, ...]] = {
    "llama": (),
    "mistral": ("sliding_window",),
    "qwen2": ("use_sliding_window",),
    "qwen3": ("head_dim", "use_sliding_window"),
    "smollm3": ("no_rope_layers", "use_sliding_window"),
}
"""The settings that a model type has besides `SIZES` and what all types have."""
NO_BIASES = {"attention_bias": False, "mlp_bias": False}
"""What files mean that do not name these settings."""
OTHER_FORMS = "auto_map", "rope_scaling", "partial_rotary_factor"
"""Settings whose meaning is left to transformers."""
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


class PlainConfig(SimpleNamespace):
    """What layers of our own read of transformers' configuration, under its names."""

    def get_text_config(self) -> PlainConfig:
        return self

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def target_config(folder: Path) -> Any:
    """Read the configuration of a target: a `PlainConfig`, or else as transformers reads it.

    Raises a CheckpointError if it is damaged, or of a type that transformers lacks.
    """
    config = plain_config(read_config(folder))
    if config is not None and isinstance(decoder_facts(config), DecoderFacts):
        return config
    return read_model_config(folder)


def plain_config(settings: Mapping[str, Any]) -> PlainConfig | None:
    """Return the configuration of a file's settings; None where it is left to transformers."""
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in SETTINGS:
        return None
    needed = (*SIZES, "rms_norm_eps", "hidden_act", "tie_word_embeddings", *SETTINGS[model_type])
    if any(name not in settings for name in needed) or any(map(settings.get, OTHER_FORMS)):
        return None
    if not all(_is_size(settings[name]) for name in SIZES):
        return None
    if not all(type(settings[name]) is bool for name in FLAGS if name in settings):
        return None
    layers, heads = settings["num_hidden_layers"], settings["num_attention_heads"]
    whole = ["full_attention"] * layers
    rope = _rope(settings)
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    is_plain = (
        settings["hidden_size"] % heads == 0
        and _is_size(settings.get("head_dim") or 1)
        and isinstance(settings["rms_norm_eps"], float)
        and isinstance(settings["hidden_act"], str)
        and not settings.get("use_sliding_window")
        and _is_size(settings.get("sliding_window") or 1)
        and settings.get("layer_types") in (None, whole)
        and _are_flags(settings.get("no_rope_layers", []))
        and rope is not None
        and dtype in (None, *DTYPES)
        and isinstance(settings.get("quantization_config") or {}, Mapping)
    )
    if not is_plain:
        return None
    changed: dict[str, Any] = {"rope_parameters": rope, "layer_types": whole}
    changed["dtype"] = None if dtype is None else DTYPES[dtype]
    if "use_sliding_window" in settings:
        changed["sliding_window"] = None
    return PlainConfig(**{**NO_BIASES, **settings, **changed})


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_flags(values: Any) -> bool:
    return isinstance(values, list) and all(type(x) is int for x in values)


def _rope(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the parameters of rotary embeddings without scaling; None for others."""
    theta = settings.get("rope_theta")
    rope = settings.get("rope_parameters") or {"rope_type": "default", "rope_theta": theta}
    if not isinstance(rope, Mapping) or rope.keys() != {"rope_type", "rope_theta"}:
        return None
    is_plain = rope["rope_type"] == "default" and type(rope["rope_theta"]) in (int, float)
    return dict(rope) if is_plain and theta in (None, rope["rope_theta"]) else None
