"""The model card of a trained drafter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import treeflash
from treeflash.drafters.formats import parse_drafter_config
from treeflash.training.config import NEW_DRAFTERS, SHAPE

CARD = """\
# TreeFlash drafter

{layers}, hidden size {hidden}, block size {block}, head {head}; context features from
target {layer_ids}. Trained with `treeflash train`, treeflash {version}.

## Training

After {step} of {steps} steps; data fingerprint {data}.

| option | value |
| --- | --- |
{options}

## Validation on held-out responses

{metrics}
"""


def model_card(
    settings: Mapping[str, Any], identity: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> str:
    """The text of a checkpoint's `README.md`.

    It takes the drafter's `config.json`, the configuration, target and data of the run, and the
    run's log.
    """
    # An existing drafter keeps its shape, whatever the options say.
    omitted = {"data"} if identity["init"] in NEW_DRAFTERS else {"data", *SHAPE}
    drafter = parse_drafter_config(settings)
    count, layer_ids = drafter.num_hidden_layers, drafter.target_layer_ids
    validations = [record["validation"] for record in records if "validation" in record]
    return CARD.format(
        layers=f"{count} layer{'s' * (count != 1)}",
        hidden=drafter.hidden_size,
        block=drafter.block_size,
        head=drafter.head or "none",
        layer_ids=f"layer{'s' * (len(layer_ids) != 1)} {', '.join(map(str, layer_ids))}",
        version=treeflash.__version__,
        step=records[-1]["step"] if records else 0,
        steps=identity["steps"],
        data=identity["data"],
        options="\n".join(f"| {k} | {v} |" for k, v in identity.items() if k not in omitted),
        metrics=_table(validations[-1]) if validations else "No responses were held out.",
    )


def _table(validation: Mapping[str, Any]) -> str:
    by_depth = {name: value for name, value in validation.items() if isinstance(value, list)}
    lines = ["| depth | " + " | ".join(by_depth) + " |", "| --- |" + " --- |" * len(by_depth)]
    for depth, values in enumerate(zip(*by_depth.values(), strict=True), 1):
        lines.append(f"| {depth} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    chains = [f"`{k}` {v:.2f}" for k, v in validation.items() if k.startswith("chain")]
    return "\n".join(lines) + "\n\nBlock efficiency of a chain: " + ", ".join(chains) + "."
