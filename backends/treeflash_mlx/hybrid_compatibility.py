"""Settings and weights of hybrid targets under the names that mlx-lm's models read them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from treeflash.errors import UnsupportedModelError

FULL, LINEAR = "full_attention", "linear_attention"
TEXT_TYPES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
"""Types that transformers gives to text models, and those of mlx-lm that run them."""
WEIGHTS: Mapping[str, Mapping[str, str]] = {
    "olmo_hybrid": {
        "attention_layer_norm": "input_layernorm",
        "feedforward_layer_norm": "post_attention_layernorm",
    }
}
"""Parts of names of weights in published files, and mlx-lm's, by type."""


def hybrid_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries to put into a `config.json`, in place of those that are there.

    Raises:
        UnsupportedModelError: mlx-lm would order the layers otherwise.
    """
    respell = SETTINGS.get(str(config.get("model_type")))
    kinds = config.get("layer_types")
    return respell(config, kinds) if respell and kinds else {}


def _interval(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """A number in place of the types of layers, which mlx-lm ignores."""
    interval = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    if any((kind == FULL) != ((i + 1) % interval == 0) for i, kind in enumerate(kinds)):
        raise UnsupportedModelError(
            f"mlx-lm's {config['model_type']} needs full attention in every n-th layer, and this "
            "target has it elsewhere; try --backend cuda"
        )
    return {"full_attention_interval": interval}


def _granite(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    names = {LINEAR: "mamba", FULL: "attention"}
    # mlx-lm rotates unless this is "nope"; in a file of transformers nothing says the same.
    positions = "rope" if config.get("position_embedding_type") == "rope" else "nope"
    return {
        "layer_types": [names.get(kind, kind) for kind in kinds],
        "position_embedding_type": positions,
    }


def _lfm2(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    return {"block_dim": config.get("block_dim", config["hidden_size"])}


SETTINGS: Mapping[str, Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", *TEXT_TYPES), _interval),
    "granitemoehybrid": _granite,
    "lfm2": _lfm2,
}
