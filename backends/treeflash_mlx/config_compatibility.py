"""Settings of a target under all the names that mlx-lm's models read them by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treeflash_mlx.hybrid_compatibility import hybrid_settings

# Settings that transformers 5 moved into `rope_parameters`, and their earlier names.
MOVED = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    "original_max_position_embeddings": ("original_max_position_embeddings",),
}
# Earlier names of the rotary base of sliding layers.
SLIDING_THETA = ("rope_local_base_freq", "swa_rope_theta")
# mlx-lm's names of other settings, and those that transformers 5 saves them under.
RENAMED = {
    "num_experts": "num_local_experts",
    "sliding_window_pattern": "_sliding_window_pattern",
}
TEXT_CONFIGS = ("text_config", "language_config")


def compatible_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries to add to a `config.json` so that it has all that mlx-lm reads.

    transformers 5 writes `rope_parameters`, for the whole model or for each type of layer; older
    files have `rope_theta` and `rope_scaling`. Most models of mlx-lm know one of the two, and
    silently use a default if they do not find it. Existing entries stay as they are, but for
    those of `hybrid_settings`.
    """
    added: dict[str, Any] = {}
    if config.get("rope_parameters"):
        added = _old_settings(config["rope_parameters"])
    elif "rope_theta" in config or config.get("rope_scaling"):
        added["rope_parameters"] = _new_settings(config)
    added |= {ours: config.get(theirs) for ours, theirs in RENAMED.items()}
    added = {
        key: value for key, value in added.items() if value is not None and config.get(key) is None
    }
    added |= hybrid_settings(config)
    for key in TEXT_CONFIGS:
        if isinstance(config.get(key), Mapping):
            added[key] = {**config[key], **compatible_settings(config[key])}
    return added


def _old_settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    added: dict[str, Any] = {}
    by_layer = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    if by_layer:
        sliding = by_layer.get("sliding_attention", {})
        added |= dict.fromkeys(SLIDING_THETA, sliding.get("rope_theta"))
        parameters = by_layer.get("full_attention", sliding)
    for key, names in MOVED.items():
        added |= dict.fromkeys(names, parameters.get(key))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        added["rope_scaling"] = {**parameters, "rope_type": kind, "type": kind}
    return added


def _new_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return {**theta, **scaling, "rope_type": kind}
