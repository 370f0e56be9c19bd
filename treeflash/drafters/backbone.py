"""The settings of the Qwen3-like backbone that all formats share, and rotary frequencies."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.drafters.config import DrafterConfig
from treeflash.errors import CheckpointError

MAX_BLOCK_SIZE = 4096
"""Slots of a block; drafters have 7 to 16. More would exhaust the memory."""
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""The rotary embeddings that drafters may have."""
KEYS = frozenset(
    (  # noqa: SIM905
        "attention_bias head_dim hidden_act hidden_size intermediate_size layer_types "
        "max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads "
        "rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window vocab_size"
    ).split()
)
"""The keys that `backbone_config` reads."""
INERT_KEYS = frozenset(
    (  # noqa: SIM905
        "_attn_implementation _name_or_path architectures attention_dropout auto_map "
        "bos_token_id dtype eos_token_id initializer_range max_anchors max_window_layers "
        "model_type num_anchors num_target_layers pad_token_id quantization tie_word_embeddings "
        "torch_dtype transformers_version use_cache use_sliding_window"
    ).split()
)
"""Keys without any effect on a drafter's forward pass."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_mode": (None, "gqa", "mha"),  # the numbers of heads tell which
    "attention_sink_bias": (None, False),
    "attention_value_scale": (None, 1),
    "dflash_query_causal": (None, False),
    "hidden_act": (None, "silu"),
    "is_neox_style": (None, True),
    "log_snr_conditioning": (None, False),
    "log_snr_embed": (None, False),
    "logits_start": (None, 0),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "rope_is_neox_style": (None, True),
    "use_swa": (None, False),
}
"""Keys that change the forward pass in unsupported ways, with the values that change nothing."""


GEMMA4_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "enable_moe_block": (None, False),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_size_per_layer_input": (None, 0),
    "num_kv_shared_layers": (None, 0),
}
"""Settings of layers like Gemma 4's that must have one of these values."""
GEMMA4_KEYS = GEMMA4_NEUTRAL.keys() | {
    "attention_k_eq_v",
    "global_head_dim",
    "num_global_key_value_heads",
}
"""The keys that `gemma4_layers` reads beside `KEYS`."""


def refuse(settings: Mapping[str, Any], neutral: Mapping[str, Collection[Any]] = NEUTRAL) -> None:
    """Raise a ValueError for the first setting whose value is not supported."""
    for key, harmless in neutral.items():
        if key in settings and settings[key] not in harmless:
            value = reprlib.repr(settings[key])  # some quantisations list all layers
            raise ValueError(f"{key} = {value} is not supported")


def refuse_adapter(target_hidden_size: Any, layers: Mapping[str, Any]) -> None:
    """Raise a ValueError for a drafter that projects states of a target of another width."""
    if target_hidden_size not in (None, layers["hidden_size"]):
        raise ValueError("a target_hidden_size unlike the drafter's hidden_size is not supported")


def draft_vocab_size(config: Mapping[str, Any], layers: Mapping[str, Any]) -> int | None:
    """Return the size of a drafter's vocabulary, or None if it is the target's, with `layers`."""
    vocab_size = int(layers["vocab_size"])
    size = int(config.get("draft_vocab_size") or vocab_size)
    return None if size == vocab_size else size


def speculators_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layers' settings of a file of speculators.

    If rotary settings differ between types of layers, all have the sliding layers' settings.
    """
    layers = dict(config["transformer_layer_config"])
    rope = layers.get("rope_parameters") or {}
    return layers | {"rope_parameters": rope.get("sliding_attention", rope)}


def layer_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the sizes of layers, as fields of `DrafterShape`, from the section that has them."""
    heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
    return {
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or hidden_size // heads),
        "rms_norm_eps": float(config["rms_norm_eps"]),
        "attention_bias": bool(config.get("attention_bias", False)),
    }


def backbone_config(
    config: Mapping[str, Any],
    *,
    block_size: int,
    mask_token_id: int | None,
    causal: bool | None,
    **settings: Any,
) -> DrafterConfig:
    """Make a configuration of a drafter's layers and of the fields in `settings`.

    `config` is the section of `config.json` that describes the layers. If `causal` is None, only
    sliding layers are causal inside a block. A missing setting raises a KeyError, a wrong type a
    TypeError, a value that is not supported a ValueError or, if rotary, a CheckpointError.
    """
    interleaved = config.get("rope_is_neox_style") is False
    refuse(config, {x: y for x, y in NEUTRAL.items() if x != "rope_is_neox_style"})
    layers, sizes = int(config["num_hidden_layers"]), layer_sizes(config)
    if block_size < 2:
        raise ValueError(f"block_size must be 2 or more, got {block_size}")
    if block_size > MAX_BLOCK_SIZE:
        raise ValueError(f"block_size must be at most {MAX_BLOCK_SIZE}, got {block_size}")
    if mask_token_id is None:
        raise KeyError("mask_token_id")
    sliding = sliding_layers(config, layers)
    window = window_size(config["sliding_window"]) if any(sliding) else None
    inv_freq, rope_scale = inverse_frequencies(rope_parameters(config), sizes["head_dim"])
    vocab_size = config.get("vocab_size")
    return DrafterConfig(
        **sizes,
        intermediate_size=int(config["intermediate_size"]),
        num_hidden_layers=layers,
        block_size=block_size,
        mask_token_id=int(mask_token_id),
        vocab_size=None if vocab_size is None else int(vocab_size),
        inv_freq=tuple(inv_freq.tolist()),
        rope_scale=rope_scale,
        interleaved_rope=interleaved,
        sliding_windows=tuple(window if slides else None for slides in sliding),
        causal=tuple(slides if causal is None else causal for slides in sliding),
        **settings,
    )


def gemma4_layers(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the settings of layers like Gemma 4's layers of full attention.

    Returns them under the names that other layers have for them, and the fields of `DrafterShape`
    that only these layers have. Frequencies are of whole heads, and the first
    `partial_rotary_factor` of the pairs turn. Raises what `backbone_config` does.
    """
    refuse(config, GEMMA4_NEUTRAL)
    if not set(config.get("layer_types") or ()) <= {"full_attention"}:
        raise ValueError(f"layer_types = {config['layer_types']!r} is not supported")
    rope = rope_parameters(config)
    refuse(rope, {"rope_type": ("proportional",)})
    head_dim, shared = int(config["global_head_dim"]), bool(config.get("attention_k_eq_v"))
    kv_heads = config.get("num_global_key_value_heads") if shared else None
    frequencies, _ = inverse_frequencies({**rope, "rope_type": "default"}, head_dim)
    frequencies[int(rope["partial_rotary_factor"] * head_dim) // 2 :] = 0
    settings = {
        "head_dim": head_dim,
        "num_key_value_heads": kv_heads or config["num_key_value_heads"],
        "rope_parameters": {"rope_theta": rope["rope_theta"]},
    }
    fields = {
        "gemma4": True,
        "keys_are_values": shared,
        "input_scale": math.sqrt(int(config["hidden_size"])),
        "inv_freq": tuple(frequencies.tolist()),
    }
    return settings, fields


def default_target_layer_ids(num_target_layers: int, num_hidden_layers: int) -> tuple[int, ...]:
    """Return the target layers whose outputs DFlash reads if a checkpoint does not name them."""
    if num_hidden_layers == 1:
        return (num_target_layers // 2,)
    steps, span = num_hidden_layers - 1, num_target_layers - 4
    return tuple(round(1 + i * span / steps) for i in range(num_hidden_layers))


def window_size(window: Any) -> int:
    """Return the width of a sliding window; a ValueError if it is no number of positions."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"sliding_window must be 1 or more for sliding layers, got {window!r}")
    return window


def sliding_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Tell by `layer_types` which layers slide; a ValueError for another number or kind of them."""
    kinds = config.get("layer_types") or ["full_attention"] * layers
    if len(kinds) != layers:
        raise ValueError(f"layer_types lists {len(kinds)} layers, num_hidden_layers is {layers}")
    for kind in kinds:
        if kind not in LAYER_TYPES:
            raise ValueError(
                f"layer type {kind!r} is not supported; known types are {', '.join(LAYER_TYPES)}"
            )
    return tuple(kind == "sliding_attention" for kind in kinds)


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
    original = "original_max_position_embeddings"
    if (length := config.get(original) or config.get("max_position_embeddings")) is not None:
        parameters.setdefault(original, length)
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
    *first, last = ROPE_TYPES
    raise CheckpointError(
        f"rope type {kind!r} is not supported; supported are {', '.join(first)} and {last}"
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
