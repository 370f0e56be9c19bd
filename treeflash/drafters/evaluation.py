"""A drafter's own evaluation, which `treeflash train` writes beside its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

EVALUATION = "evaluation.json"
"""The file of a drafter's folder with the validation of its training, as the log of the run has it,
and `max_length`, the option of the run. Published drafters have none."""

OTHER_CONTENTS = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""What reading a file of this name raises that somebody else has written."""


@dataclass(frozen=True, kw_only=True)
class DrafterEvaluation:
    """How often a drafter was right on responses that it was not trained on.

    Attributes:
        by_depth: shares of anchors at which its most probable token was the response's, of depth 1,
            2, ...; with its AR head if it has one.
        max_length: tokens of the longest texts that it was trained on.
    """

    by_depth: tuple[float, ...]
    max_length: int


def read_evaluation(folder: Path) -> DrafterEvaluation | None:
    """Read the evaluation in a drafter's folder; None if it has none in this form."""
    try:
        record = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        shares = record.get("top1_corrected") or record["top1_marginal"]
        by_depth, max_length = tuple(map(float, shares)), int(record["max_length"])
    except (OSError, *OTHER_CONTENTS):
        return None
    if not by_depth or not all(0 <= share <= 1 for share in by_depth):
        return None
    return DrafterEvaluation(by_depth=by_depth, max_length=max_length)
