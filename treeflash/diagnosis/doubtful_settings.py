"""Settings of a drafter that are published, or written, in more than one way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters.formats import SPECULATORS, format_of

IN_CONFIG = "set it in the drafter's config.json"


@dataclass(frozen=True, kw_only=True)
class DoubtfulSetting:
    """A setting, and the values to try instead of a drafter's own.

    Attributes:
        check: the name of the finding.
        others: settings as `with_settings` takes them, by how to name them.
        advice: what to do if one is better.
    """

    check: str
    others: Mapping[str, Mapping[str, object]]
    advice: str


def doubtful_settings(
    config: DrafterConfig,
    own: Mapping[str, Any],
    target: Mapping[str, Any],
    masks: Mapping[int, str],
) -> list[DoubtfulSetting]:
    """What to try for a drafter.

    Args:
        config: of the drafter.
        own: its `config.json`.
        target: that of the target; empty if it is not known.
        masks: names of tokens that may be the mask, by id.
    """
    layers = [[i + step for i in config.target_layer_ids] for step in (-1, 1)]
    settings = [
        DoubtfulSetting(
            check="target layers",
            others={f"target_layer_ids {ids}": {"target_layer_ids": ids} for ids in layers},
            advice=IN_CONFIG,
        ),
        DoubtfulSetting(
            check="mask token",
            others={
                f"mask_token_id {token_id} ({name})": {"mask_token_id": token_id}
                for token_id, name in masks.items()
            },
            advice=IN_CONFIG,
        ),
    ]
    windows = zip(config.sliding_windows, config.causal, strict=True)
    sliding = [causal for window, causal in windows if window is not None]
    if sliding:
        settings.append(
            DoubtfulSetting(
                check="causal block",
                others={f"is_causal {not sliding[0]}": {"is_causal": not sliding[0]}},
                advice="whether sliding layers are causal inside a block; set it in the drafter's "
                "config.json (speculators: sliding_window_non_causal, the opposite)",
            )
        )
    if str(target.get("model_type")).startswith("gemma") and format_of(own) is not SPECULATORS:
        scale = 1.0 if config.input_scale != 1 else config.hidden_size**0.5
        settings.append(
            DoubtfulSetting(
                check="embedding scale",
                others={f"input_embedding_scale {scale:g}": {"input_embedding_scale": scale}},
                advice=f"drafters of scaled embeddings are published both ways; {IN_CONFIG}",
            )
        )
    return settings
