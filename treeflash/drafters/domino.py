"""Domino (SpecForge): a correction of the logits by a GRU over the tokens of a block so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters.dflash import parse_backbone, setting

PREFIXES = ("prefix_gru.", "embed_proj.")
"""Of the head's tensors, which keep their names."""
KEYS = frozenset({"emb_dim", "gru_hidden_dim", "pure_draft_prefix_len", "shift_label"})


def parse_config(config: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that a configuration describes; raises what `backbone_config` does."""
    sizes = [setting(config, key) for key in ("emb_dim", "gru_hidden_dim")]
    for key, size in zip(("emb_dim", "gru_hidden_dim"), sizes, strict=True):
        if size is None:
            raise KeyError(key)
    rank, state_size = (int(size) for size in sizes)
    if min(rank, state_size) < 1:
        raise ValueError(f"emb_dim and gru_hidden_dim must be 1 or more, got {sizes}")
    return parse_backbone(
        config,
        first_slot=0 if setting(config, "shift_label", False) else 1,
        head="domino",
        head_rank=rank,
        head_state_size=state_size,
        head_from_depth=1 + int(setting(config, "pure_draft_prefix_len", 0)),
    )


def head_shapes(config: DrafterConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a head's tensors, by canonical name; `vocab_size` is the target's."""
    h, r, g = config.hidden_size, config.head_rank, config.head_state_size
    return {
        "prefix_gru.weight_ih_l0": (3 * g, h),
        "prefix_gru.weight_hh_l0": (3 * g, g),
        "embed_proj.0.weight": (r, h + g),
        "embed_proj.2.weight": (vocab_size, r),
    }
