"""DeepSpec (deepseek-ai): DSpark, and the DFlash of DeepSeek, which is DSpark without heads.

Slot k of a block predicts token k + 1: that of the root counts. The rest of the configuration is
a copy of the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters import markov
from treeflash.drafters.dflash import parse_backbone

KEYS = markov.KEYS | {"draft_vocab_size"}


def parse_config(config: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that a configuration describes; raises what `backbone_config` does."""
    draft_vocab_size = config.get("draft_vocab_size")
    if draft_vocab_size not in (None, config.get("vocab_size")):
        raise ValueError(f"draft_vocab_size = {draft_vocab_size!r} is not supported")
    if "target_layer_ids" not in config and "dflash_config" not in config:
        raise KeyError("target_layer_ids")
    return parse_backbone(config, first_slot=0, own_vocabulary=True, **markov.head_settings(config))
