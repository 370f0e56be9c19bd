"""speculators (vllm-project; RedHatAI, poolside and others): DFlash, DFlash2 and DSpark.

A nested configuration. Its layer ids index the hidden states of transformers, of which the first
are the embeddings; it may have a smaller vocabulary of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters import dflash2, markov
from treeflash.drafters.backbone import backbone_config

TYPES = ("dflash", "dflash2", "dspark")
KEYS = (
    frozenset(
        [
            "aux_hidden_state_layer_ids",
            "block_size",
            "draft_vocab_size",
            "mask_token_id",
            "sample_from_anchor",
            "sliding_window_non_causal",
            "speculators_config",
            "speculators_model_type",
            "speculators_version",
            "target_hidden_size",
            "transformer_layer_config",
        ]
    )
    | dflash2.KEYS
    | markov.KEYS
)
IGNORED = frozenset({"t2d", "verifier_lm_head.weight", "verifier_norm.weight"})
"""Tensors that only training needs."""


def parse_config(config: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that a configuration describes; raises what `backbone_config` does."""
    kind = config["speculators_model_type"]
    if kind not in TYPES:
        raise ValueError(
            f"speculators of type {kind!r} are not supported; known are {', '.join(TYPES)}"
        )
    layers = _layers(config["transformer_layer_config"])
    if config.get("target_hidden_size") not in (None, layers["hidden_size"]):
        raise ValueError("a target_hidden_size unlike the drafter's hidden_size is not supported")
    for key in ("mask_token_id", "aux_hidden_state_layer_ids"):
        if config.get(key) is None:
            raise KeyError(key)
    settings: dict[str, Any] = {}
    if kind == "dflash2":
        settings = dflash2.head_settings(config, layers)
    if kind == "dspark":
        settings = markov.head_settings({"enable_confidence_head": True, **_dspark(config)})
    non_causal = config.get("sliding_window_non_causal")
    if non_causal is None:
        non_causal = kind == "dflash2"
    vocab_size = int(layers["vocab_size"])
    draft_vocab_size = int(config.get("draft_vocab_size") or vocab_size)
    if draft_vocab_size != vocab_size and kind == "dflash2":
        raise ValueError("DFlash2 with a vocabulary of its own is not supported")
    block_size = int(config.get("block_size", 8))
    return backbone_config(
        layers,
        block_size=block_size,
        mask_token_id=config["mask_token_id"],
        causal=False if non_causal else None,
        target_layer_ids=tuple(int(i) - 1 for i in config["aux_hidden_state_layer_ids"]),
        num_target_layers=None,
        first_slot=0 if _samples_from_anchor(config, kind, block_size) else 1,
        window_from_root=True,
        own_vocabulary=True,
        draft_vocab_size=None if draft_vocab_size == vocab_size else draft_vocab_size,
        **settings,
    )


def _layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The layers' settings; of rotary settings by kind of layer, those of sliding ones."""
    rope = dict(config.get("rope_parameters") or {})
    return {**config, "rope_parameters": rope.get("sliding_attention", rope)}


def _dspark(config: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: config[key] for key in markov.KEYS if config.get(key) is not None}
    return {"markov_rank": 256, **given}


def _samples_from_anchor(config: Mapping[str, Any], kind: str, block_size: int) -> bool:
    """Whether the root's slot predicts the first token."""
    section = config.get("speculators_config") or {}
    methods = section.get("proposal_methods") or [{}]
    width = methods[0].get("speculative_tokens")
    given = config.get("sample_from_anchor")
    if given is None:
        # Files without the key were trained both ways; the width of proposals tells which.
        return kind == "dspark" and width == block_size
    if given is False and width is not None and int(width) >= block_size and kind != "dflash":
        raise ValueError(
            f"sample_from_anchor is false, but speculative_tokens {width} needs the anchor's slot "
            f"of block_size {block_size}"
        )
    return bool(given)
