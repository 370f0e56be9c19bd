"""Losses of a drafter by name, and weighted sums of them."""

from __future__ import annotations

import math
import re

from treeflash.errors import ConfigError

LOSSES = {
    "kl": "forward KL divergence from the target's distribution",
    "ce": "cross-entropy of the text's token",
    "tv": "total variation distance from the target's distribution",
    "lk": "KL and total variation, mixed by acceptance (arXiv 2602.23881)",
}
TERM = re.compile(r"(?:(\S+)\s+)?([a-z]+)")


def parse_loss(text: str) -> dict[str, float]:
    """The weight of each loss in a sum such as `0.1 ce + 0.9 tv`; a weight of 1 may be left out.

    Raises:
        ConfigError: a loss is unknown or named twice, or a weight is not a number above 0.
    """
    weights: dict[str, float] = {}
    for term in text.split("+"):
        found = TERM.fullmatch(term.strip())
        name = found[2] if found else term.strip()
        if found is None or name not in LOSSES:
            raise ConfigError(
                f"unknown loss {name!r}; choose one of {', '.join(LOSSES)}, or a sum such as "
                "'0.1 ce + 0.9 tv'"
            )
        if name in weights:
            raise ConfigError(f"loss {text!r} names {name} twice")
        try:
            weights[name] = float(found[1] or 1)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ConfigError(f"the weight of {name} must be a number above 0, got {found[1]!r}")
    return weights
