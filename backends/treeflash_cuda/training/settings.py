"""The `config.json` of the drafter to train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters import dflash2
from treeflash.drafters.backbone import default_target_layer_ids
from treeflash.drafters.folder import read_config, stored_shapes
from treeflash.drafters.formats import drafter_config
from treeflash.drafters.loading import VOCABULARY
from treeflash.drafters.treeflash import HEADS
from treeflash.errors import ConfigError
from treeflash.training.config import DEFAULT_LAYERS, NEW, TrainConfig, trained_head_name
from treeflash_cuda.target import Target

RANK = 256
"""Of the heads `markov` and `selector`, as published."""


def drafter_settings(config: TrainConfig, target: Target) -> dict[str, Any]:
    """The `config.json` of the drafter to train, in the published TreeFlash format.

    Raises:
        ConfigError: the configuration does not fit the target.
        CheckpointError: `init` names a folder without a drafter.
    """
    if config.init in NEW:
        return with_head(_new_settings(config, target), config)
    folder = Path(config.init)
    given = drafter_config(folder)
    _refuse_own_parts(folder, given)
    settings = _with_layers(read_config(folder), given.num_hidden_layers, config)
    if trained_head_name(given.head) == config.head:
        return settings
    if not {config.head, trained_head_name(given.head)} <= {"none", *HEADS}:
        raise ConfigError(
            f"the drafter in {folder} has the head {trained_head_name(given.head)}, and its layers "
            f"cannot serve the head {config.head}; use another --init"
        )
    return with_head(settings, config)


def _with_layers(settings: dict[str, Any], own: int, config: TrainConfig) -> dict[str, Any]:
    """The configuration of a drafter of `own` layers with as many as training wants."""
    if config.layers is None or config.layers <= own:
        return settings
    if "num_hidden_layers" not in settings:
        raise ConfigError(f"layers cannot be added to the format of {config.init}; leave it out")
    settings = {**settings, "num_hidden_layers": config.layers}
    if kinds := settings.get("layer_types"):
        settings["layer_types"] = [*kinds, *kinds[-1:] * (config.layers - own)]
    return settings


def _refuse_own_parts(folder: Path, config: DrafterConfig) -> None:
    """Raise a ConfigError for what training does not know in a drafter of another format."""
    own = set(VOCABULARY) & stored_shapes(folder).keys()
    parts = {
        "a confidence head": config.confidence_head,
        "embeddings or an output head of its own": own,
        "windows measured from the root": config.window_from_root and any(config.sliding_windows),
        "a factor on its logits": config.output_multiplier != 1,
        "a softcap": config.softcap is not None,
        "features of the embeddings": -1 in config.target_layer_ids,
    }
    for name, present in parts.items():
        if present:
            raise ConfigError(f"training does not support the drafter in {folder}: it has {name}")


def with_head(settings: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """A DFlash or TreeFlash configuration with a head, in the format that has it."""
    drafter, head = dict(settings), config.head
    candidates = dict(drafter.pop("treeflash_config", None) or {}).get("candidate_tokens", 16)
    rank = config.head_size or RANK
    if head == "selector":
        drafter["architectures"] = ["DFlash2DraftModel"]
        drafter["dflash_config"] = {
            **drafter["dflash_config"],
            "selector_rank": rank,
            "selector_top_k": candidates,
            "conv_kernel_size": dflash2.DEFAULTS["conv_kernel_size"],
            "conv_group_size": math.gcd(
                drafter["hidden_size"], dflash2.DEFAULTS["conv_group_size"]
            ),
        }
    elif head == "markov":
        drafter["architectures"] = ["Qwen3DSparkModel"]
        drafter |= {"markov_rank": rank, "markov_head_type": "vanilla"}
    else:
        name = None if head == "none" else head
        drafter["architectures"] = ["TreeFlashDraftModel" if name else "DFlashDraftModel"]
        drafter["treeflash_config"] = {"ar_approximation": name, "candidate_tokens": candidates}
    return drafter


def _new_settings(config: TrainConfig, target: Target) -> dict[str, Any]:
    target_config, depth = target.config, len(target.layers)
    count = config.layers or DEFAULT_LAYERS
    if count >= depth:
        raise ConfigError(f"layers must be below the target's {depth}, got {count}")
    layer_ids = config.target_layer_ids
    if layer_ids is None:
        spread = default_target_layer_ids(depth, count) if depth > 4 else (0,)
        # The last one is the input of the first copied layer in the target.
        layer_ids = (*spread[:-1], depth - count - 1)
        layer_ids = tuple(sorted({i for i in layer_ids if i < depth - count}))
    if not layer_ids or any(not 0 <= i < depth for i in layer_ids):
        raise ConfigError(f"target-layer-ids must be from 0 to {depth - 1}, got {layer_ids}")
    heads = int(target_config.num_attention_heads)
    head_dim = getattr(target_config, "head_dim", None) or target_config.hidden_size // heads
    first = target.layers[0]
    attention = getattr(first, "self_attn", None)
    bias = getattr(getattr(attention, "q_proj", None), "bias", None) is not None
    mask_token_id = config.mask_token_id
    if mask_token_id is None:
        mask_token_id = _mask_token(target_config)
    if not 0 <= mask_token_id < target.vocab_size:
        raise ConfigError(
            f"mask-token-id must be from 0 to {target.vocab_size - 1}, got {mask_token_id}"
        )
    rope = getattr(target_config, "rope_parameters", None) or {"rope_theta": 10000.0}
    if any(isinstance(value, dict) for value in rope.values()):  # by kind of layer
        rope = rope.get("full_attention") or next(iter(rope.values()))
    return {
        "model_type": "qwen3",
        "attention_bias": bias,
        "block_size": config.block_size,
        "dflash_config": {
            "mask_token_id": mask_token_id,
            "target_layer_ids": list(layer_ids),
        },
        "dtype": "bfloat16",
        "head_dim": int(head_dim),
        "hidden_act": "silu",
        "hidden_size": int(target_config.hidden_size),
        "intermediate_size": int(target_config.intermediate_size),
        "layer_types": ["full_attention"] * count,
        "max_position_embeddings": int(target_config.max_position_embeddings),
        "num_attention_heads": heads,
        "num_hidden_layers": count,
        "num_key_value_heads": int(getattr(target_config, "num_key_value_heads", None) or heads),
        "num_target_layers": depth,
        "rms_norm_eps": float(getattr(target_config, "rms_norm_eps", 1e-6)),
        "rope_parameters": {"rope_type": "default", **rope},
        "tie_word_embeddings": False,
        "vocab_size": target.vocab_size,
    }


def _mask_token(config: Any) -> int:
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, list):
            value = value[0]
        if value is not None:
            return int(value)
    return 0
