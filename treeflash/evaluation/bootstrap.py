"""How sure a figure is: the same figure of prompts drawn again, with replacement."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95


def resamples(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(1 + RESAMPLES, n) indices of n prompts: each once in row 0, drawn anew in the others."""
    return np.concatenate([np.arange(n)[None], rng.integers(0, n, (RESAMPLES, n))])


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The ends of the percentile interval of level `LEVEL`.

    Args:
        values: (1 + RESAMPLES,) a figure of each row of `resamples`.
    """
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
