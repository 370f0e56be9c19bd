"""DFlash (arXiv 2602.06036), as z-lab publishes it: slot k of a block of masks predicts token k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters.backbone import NEUTRAL, backbone_config, default_target_layer_ids, refuse

SECTIONS = ("dflash_config", "treeflash_config")
"""Where a `config.json` may hold a drafter's own settings; the top level is searched last."""
KEYS = frozenset(
    [
        "block_size",
        "causal",
        "dflash_config",
        "final_logit_softcapping",
        "input_embedding_scale",
        "is_causal",
        "mask_token_id",
        "num_target_layers",
        "output_multiplier",
        "projector_type",
        "swa_window_size",
        "target_layer_ids",
    ]
)
NOT_DFLASH: dict[str, tuple[Any, ...]] = {
    "markov_rank": (None, 0),
    "selector_top_k": (None,),
    "projector_type": (None, "dflash"),
}
"""Keys of other formats, with the values that mean nothing."""


def setting(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A drafter's setting, from whichever section of its `config.json` holds it."""
    sections = [dict(config.get(name) or {}) for name in SECTIONS]
    return next((section[key] for section in (*sections, config) if key in section), default)


def parse_config(config: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that a DFlash configuration describes; raises what `backbone_config` does."""
    for section in (config, *(dict(config.get(name) or {}) for name in SECTIONS)):
        refuse(section, NOT_DFLASH)
    return parse_backbone(config)


def parse_backbone(config: Mapping[str, Any], **settings: Any) -> DrafterConfig:
    """The same for the formats that build on DFlash, with further fields of `DrafterConfig`."""
    for name in SECTIONS:
        refuse(dict(config.get(name) or {}), NEUTRAL)
    layers = int(config["num_hidden_layers"])
    target_layers = config.get("num_target_layers")
    layer_ids = setting(config, "target_layer_ids")
    if layer_ids is None:
        layer_ids = default_target_layer_ids(int(config["num_target_layers"]), layers)
    # The published code makes sliding layers causal unless the checkpoint says otherwise.
    causal = setting(config, "is_causal", setting(config, "causal"))
    softcap = setting(config, "final_logit_softcapping")
    return backbone_config(
        config,
        block_size=int(setting(config, "block_size", 16)),
        mask_token_id=setting(config, "mask_token_id"),
        causal=None if causal is None else bool(causal),
        target_layer_ids=tuple(int(i) for i in layer_ids),
        num_target_layers=None if target_layers is None else int(target_layers),
        input_scale=float(setting(config, "input_embedding_scale", 1.0)),
        output_multiplier=float(setting(config, "output_multiplier", 1.0)),
        softcap=float(softcap) if softcap and softcap > 0 else None,
        **settings,
    )
