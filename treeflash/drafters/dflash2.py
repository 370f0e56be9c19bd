"""DFlash2 (z-lab, incoai): DFlash with convolutions along a block, and a candidate selector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters.dflash import parse_backbone, setting

HEAD_PREFIX = "candidate_selector."
DEFAULTS = {
    "conv_kernel_size": 2,
    "conv_group_size": 16,
    "selector_rank": 256,
    "selector_top_k": 16,
}
"""The settings, with the values of the published drafters."""
KEYS = frozenset(DEFAULTS)


def parse_config(config: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that a configuration describes; raises what `backbone_config` does."""
    return parse_backbone(
        config, **head_settings({key: setting(config, key) for key in DEFAULTS}, config)
    )


def head_settings(given: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `DrafterConfig` for a selector, from its settings and those of the layers."""
    values = {
        key: int(default if given.get(key) is None else given[key])
        for key, default in DEFAULTS.items()
    }
    if any(value < 1 for value in values.values()):
        raise ValueError(f"the settings of DFlash2 must be 1 or more, got {values}")
    if int(config["hidden_size"]) % values["conv_group_size"]:
        raise ValueError(
            f"hidden_size {config['hidden_size']} is not a multiple of "
            f"conv_group_size {values['conv_group_size']}"
        )
    return {
        "head": "selector",
        "head_rank": values["selector_rank"],
        "selector_top_k": values["selector_top_k"],
        "conv_kernel_size": values["conv_kernel_size"],
        "conv_group_size": values["conv_group_size"],
    }


def head_shapes(hidden_size: int, vocab_size: int, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a selector's tensors, by canonical name."""
    return {
        HEAD_PREFIX + "predecessor_codebook": (vocab_size, rank),
        HEAD_PREFIX + "successor_codebook": (vocab_size, rank),
        HEAD_PREFIX + "hidden_projection.weight": (rank, hidden_size),
    }
