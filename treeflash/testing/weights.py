"""Random weights of tiny models."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]

INWARD, OUTWARD = 0.2, 0.08
"""Standard deviations of weights in general, and of those that write to the residual stream: these
are smaller, so that the newest token still shows at the last layer and texts do not get stuck."""


def normal(rng: np.random.Generator, *shape: int, scale: float = INWARD) -> NDArray[np.float32]:
    """Weights."""
    return rng.normal(0.0, scale, shape).astype(np.float32)


def norm(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """The weight of a norm."""
    return 1 + normal(rng, size, scale=0.1)
