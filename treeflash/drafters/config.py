"""The configuration of a drafter of any format, and its rotary frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import SINK
from treeflash.errors import CheckpointError

LayerKind: TypeAlias = tuple[int | None, bool]
"""The window of a layer of a block drafter, None for all positions, and whether it is causal."""


@dataclass(frozen=True, kw_only=True)
class DrafterShape:
    """What every drafter has: the shape of its layers, what they read, and its output."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_bias: bool
    # target layers whose outputs are the context features, in order; -1 is the output of the
    # embeddings
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None  # depth of the target that it was trained for; None if not given
    vocab_size: int | None  # the target's vocabulary size; None if not given
    # (head_dim // 2,) rotary inverse frequencies, radians per position; the last ones are 0 if only
    # the first channels of a head are rotated, which `arrange_block` reorders
    inv_freq: tuple[float, ...]
    rope_scale: float  # factor on the rotary cosines and sines; 1 except for YaRN
    # per layer, the width of its window in positions, or None
    sliding_windows: tuple[int | None, ...]
    causal: tuple[bool, ...]  # per layer, whether a slot attends only to itself and earlier slots
    # per inverse frequency, the axis of rotary positions (0 time, 1 height, 2 width) that turns its
    # channels; None if they have one axis
    rotary_axes: tuple[int, ...] | None = None
    # whether the attention's output is multiplied by a sigmoid gate, which the stored `q_proj` has
    # behind the queries of each head
    gated: bool = False
    norm_offset: float = 0.0  # added to the stored weights of the norms
    # whether the layers are Gemma 4's: their values are normed, their scores not scaled, and their
    # sublayers' outputs normed too
    gemma4: bool = False
    # whether these values are the projected keys, so that there is no `v_proj`
    keys_are_values: bool = False
    input_scale: float = 1.0  # factor on the embeddings at the drafter's input
    # name of the conditional head, a key of `treeflash.drafters.formats.HEADS`, or of the kind of
    # head that drafts depth by depth; None for a drafter of marginals
    head: str | None = None
    output_multiplier: float = 1.0  # factor on the drafter's logits
    # bound of the drafter's logits after the factor, by a hyperbolic tangent
    softcap: float | None = None
    own_vocabulary: bool = False  # whether the folder may hold embeddings and an output head
    # number of tokens that the drafter can propose; None is all of them
    draft_vocab_size: int | None = None

    @property
    def depths(self) -> int:
        """D, the depths that a draft has at most."""
        raise NotImplementedError

    @property
    def has_marginals(self) -> bool:
        """Whether all depths come from one pass, with distributions that ignore the drafts."""
        raise NotImplementedError

    @property
    def scratch_rows(self) -> int:
        """Columns of the KV cache that a draft writes after the committed positions."""
        raise NotImplementedError

    @property
    def column_size(self) -> int:
        """Numbers that the KV cache keeps for each position."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    @property
    def groups(self) -> int:
        """Heads that share a key head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def attention_scale(self) -> float:
        """Factor on the scores of the attention."""
        return 1.0 if self.gemma4 else self.head_dim**-0.5


@dataclass(frozen=True, kw_only=True)
class DrafterConfig(DrafterShape):
    """The shape of a block drafter, from its checkpoint."""

    block_size: int  # S, the slots of a block: the root and S - 1 masks
    mask_token_id: int  # the token in the slots after the root
    # whether the softmax of each query head has one more logit, of a key without a value
    attention_sinks: bool = False
    # whether rotary pairs are neighbouring channels (2i, 2i + 1) in the stored tensors, instead of
    # the halves of a head; `arrange_block` reorders them
    interleaved_rope: bool = False
    # the first slot that predicts a token. 1: slot k predicts token k after the root (DFlash); 0:
    # slot k predicts token k + 1 (DSpark)
    first_slot: int = 1
    # whether all slots of a sliding layer see the block and one window of positions before the
    # root, instead of a window around each slot
    window_from_root: bool = False
    # taps of the convolutions along a block (DFlash2); 0 without convolutions
    conv_kernel_size: int = 0
    conv_group_size: int = 1  # channels that share a coefficient of these convolutions
    head_rank: int = 0  # inner width of the heads of DFlash2, DSpark and Domino
    # width of the state of the heads `rnn` and `domino`, which depend on all tokens of a path; 0
    # for other heads
    head_state_size: int = 0
    head_from_depth: int = 1  # the first depth that the head `domino` corrects
    selector_top_k: int = 0  # candidates of a slot that the head `selector` scores
    # whether there is a head that predicts the acceptance of each token
    confidence_head: bool = False
    confidence_with_markov: bool = False  # whether the confidence head reads the previous token too

    @property
    def depths(self) -> int:
        return self.block_size - self.first_slot

    @cached_property
    def layer_kinds(self) -> list[LayerKind]:
        """By layer, which positions its slots see."""
        return list(zip(self.sliding_windows, self.causal, strict=True))

    @property
    def extensions(self) -> dict[str, tuple[str, bool]]:
        """By field, what its layers or logits may have beyond DFlash's, and whether they have."""
        return {
            "output_multiplier": ("a factor on its logits", self.output_multiplier != 1),
            "softcap": ("a softcap", self.softcap is not None),
            "interleaved_rope": ("interleaved rotary embeddings", self.interleaved_rope),
            "gated": ("gated queries", self.gated),
            "attention_sinks": ("attention sinks", self.attention_sinks),
            "gemma4": ("Gemma 4's layers", self.gemma4),
        }

    @property
    def has_marginals(self) -> bool:
        return True

    @property
    def scratch_rows(self) -> int:
        return self.block_size


def window_gap(start: int, window: int | None) -> tuple[int, int]:
    """Return the gap between the first `SINK` positions and the `window` before `start`.

    It is (first, end), empty if `window` is None.
    """
    return (SINK, max(SINK, start - window)) if window is not None else (0, 0)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of a `config.json`: `rope_parameters`, or older keys."""
    current = config.get("rope_parameters") or {}
    by_type = (current.get(f"{kind}_attention") for kind in ("full", "sliding"))
    current = next(filter(None, by_type), current)  # some files have settings by layer type
    parameters = {**(config.get("rope_scaling") or {}), **current}
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    share = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor")
    parameters["partial_rotary_factor"] = float(share or 1)
    if parameters["rope_type"] == "mrope":  # an older name of several axes, see `rotary_axes`
        parameters["rope_type"] = "default"
    if "max_position_embeddings" in config:
        parameters.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return parameters


def inverse_frequencies(
    parameters: Mapping[str, Any], head_dim: int
) -> tuple[NDArray[np.float64], float]:
    """Return the (head_dim // 2,) rotary inverse frequencies, radians per position.

    The second result is the factor on cosines and sines, 1 except for YaRN. `parameters` come from
    `rope_parameters`. A CheckpointError is raised if the type is not supported, or a setting is
    missing or not above 0.
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
        f"rope type {kind!r} is not supported; supported are default, linear, llama3 and yarn"
    )


def rotary_axes(parameters: Mapping[str, Any], pairs: int) -> tuple[int, ...] | None:
    """Return the axis that turns each pair of channels (M-RoPE); None if there is one axis.

    The axes of rotary positions are time, height and width. They have consecutive sections of the
    pairs (Qwen2-VL, arXiv 2409.12191), or take turns while height and width have any left, and the
    rest is of time (Qwen3-VL). A CheckpointError is raised if the sections do not fit the pairs.
    """
    if not (sections := parameters.get("mrope_section")):
        return None
    if len(sections) != 3 or sum(sections) != pairs:
        raise CheckpointError(f"mrope_section {sections} does not fit {pairs} pairs of channels")
    if not parameters.get("mrope_interleaved"):
        return tuple(axis for axis, count in enumerate(sections) for _ in range(count))
    axes = [0] * pairs
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = [axis] * len(axes[axis : 3 * sections[axis] : 3])
    return tuple(axes)


def _positive(parameters: Mapping[str, Any], key: str) -> float:
    value = parameters[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"{key} in config.json must be a number above 0, got {value!r}")
    return float(value)


def _llama3(plain: NDArray[np.float64], p: Mapping[str, Any]) -> NDArray[np.float64]:
    """Long wavelengths are stretched by `factor`, short ones unchanged, others interpolated."""
    turns = p["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    share: NDArray[np.float64] = np.clip((turns - low) / (high - low), 0, 1)
    return share * plain + (1 - share) * plain / _positive(p, "factor")


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
