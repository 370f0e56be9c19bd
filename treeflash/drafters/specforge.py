"""SpecForge (sgl-project): DSpark's heads on a DFlash backbone.

Trained on the tokens after the root, as DeepSpec's: slot k predicts token k + 1. (Its own
`spec_generate` reads the slots one later.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters import markov
from treeflash.drafters.dflash import parse_backbone

KEYS = markov.KEYS | {"attention_mode"}


def parse_config(config: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that a configuration describes; raises what `backbone_config` does."""
    return parse_backbone(config, first_slot=0, own_vocabulary=True, **markov.head_settings(config))
