"""Bootstrap confidence intervals over prompts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95


def resamples(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of resampled prompts.

    Returns:
        (1 + RESAMPLES, n) indices of n prompts; row 0 has each once, the other rows are drawn with
        replacement.
    """
    return np.concatenate([np.arange(n)[None], rng.integers(0, n, (RESAMPLES, n))])


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The percentile interval of level `LEVEL`, as (low, high).

    Args:
        values: (1 + RESAMPLES,) a statistic of each row of `resamples`.
    """
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
