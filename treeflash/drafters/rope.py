"""A drafter's rotary frequencies, computed once for all backends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.errors import CheckpointError


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a `config.json`, under whichever keys it holds them.

    transformers 5 writes `rope_parameters`; older files have `rope_theta` and `rope_scaling`.
    """
    given = config.get("rope_parameters") or {}
    given = given.get("full_attention", given)  # some files tell layer types apart
    parameters = dict(config.get("rope_scaling") or {}) | dict(given)
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    if "max_position_embeddings" in config:
        parameters.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return parameters


def inverse_frequencies(
    parameters: Mapping[str, Any], head_dim: int
) -> tuple[NDArray[np.float64], float]:
    """Inverse frequencies, and the factor on cosines and sines.

    Args:
        parameters: from `rope_parameters`; types `default`, `linear`, `llama3`, `yarn`.
        head_dim: even.

    Returns:
        (head_dim // 2,) float64 radians per position, and the factor (1 except for YaRN).

    Raises:
        CheckpointError: another type, or a setting that is missing or not a number above 0.
    """
    base = _positive(parameters, "rope_theta")
    plain = base ** -(np.arange(0, head_dim, 2) / head_dim)
    kind = parameters["rope_type"]
    try:
        if kind == "default":
            return plain, 1.0
        if kind == "linear":
            return plain / _positive(parameters, "factor"), 1.0
        if kind == "llama3":
            return _llama3(plain, parameters), 1.0
        if kind == "yarn":
            return _yarn(plain, parameters, base, head_dim)
    except KeyError as error:
        raise CheckpointError(f"rope type {kind!r} needs {error} in config.json") from error
    raise CheckpointError(
        f"rope type {kind!r} is not supported; known are default, linear, llama3 and yarn"
    )


def _positive(parameters: Mapping[str, Any], key: str) -> float:
    value = parameters[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"{key} in config.json must be a number above 0, got {value!r}")
    return float(value)


def _llama3(plain: NDArray[np.float64], p: Mapping[str, Any]) -> NDArray[np.float64]:
    """Long wavelengths are stretched by `factor`, short ones kept, the others interpolated."""
    turns = p["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    kept: NDArray[np.float64] = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / _positive(p, "factor")


def _yarn(
    plain: NDArray[np.float64], p: Mapping[str, Any], base: float, head_dim: int
) -> tuple[NDArray[np.float64], float]:
    """YaRN (arXiv 2309.00071): a linear ramp over dimensions between two numbers of turns."""

    def dimension(turns: float) -> float:
        positions = p["original_max_position_embeddings"] / (2 * math.pi * turns)
        return head_dim * math.log(positions) / (2 * math.log(base))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high > low else 0.001
    stretched = np.clip((np.arange(head_dim // 2) - low) / span, 0, 1)
    factor = _positive(p, "factor")

    def attention_scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    scale = p.get("attention_factor")
    if scale is None:
        weights = p.get("mscale"), p.get("mscale_all_dim")
        scale = (
            attention_scale(weights[0]) / attention_scale(weights[1])
            if weights[0] and weights[1]
            else attention_scale(1.0)
        )
    return stretched * plain / factor + (1 - stretched) * plain, float(scale)
