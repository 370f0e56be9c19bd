"""The facts by which families of dense decoders differ, read from a target's configuration.

All families of `FAMILIES` have the layers of `decoder`: norms before attention and
before a gated network, rotary embeddings of whole heads, and keys that groups of heads share. What
else a configuration of transformers may say is no fact here, and `decoder_facts` says so: such a
target runs as a model of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from treeflash.low_bit_formats import find_format

ATTENTION = "q_proj", "k_proj", "v_proj", "o_proj"
NETWORK = "gate_proj", "up_proj", "down_proj"
"""The linear layers of a decoder's layer, by the names of their tensors."""
ROPE_TYPES = "default", "linear", "llama3", "yarn"
"""Rotary embeddings whose frequencies do not depend on the length of a text."""


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """What a model type has, and which of its settings decide about it."""

    biases: tuple[str, ...] = ()  # linear layers that have a bias
    # Linear layers that have a bias if a setting of this name asks for it.
    optional_biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norms_heads: bool = False  # whether queries and keys are normed by head, before the rotation
    # The layers with a window: none, "all" if there is a window, or by "layer_types".
    windows: str | None = None
    rotated: str | None = None  # the setting that lists which layers rotate; None if all do


_LLAMA_BIASES = {"attention_bias": ATTENTION, "mlp_bias": NETWORK}
FAMILIES = {
    "llama": DecoderFamily(optional_biases=_LLAMA_BIASES),
    "mistral": DecoderFamily(windows="all"),
    "qwen2": DecoderFamily(biases=ATTENTION[:3], windows="layer_types"),
    "qwen3": DecoderFamily(
        optional_biases={"attention_bias": ATTENTION}, norms_heads=True, windows="layer_types"
    ),
    "smollm3": DecoderFamily(
        optional_biases=_LLAMA_BIASES, windows="layer_types", rotated="no_rope_layers"
    ),
}
"""By model type."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderFacts:
    """What a decoder is made of."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float  # the norms' epsilon
    ties_head: bool  # whether the output head's weight is the table of embeddings
    biases: frozenset[str]  # the linear layers of a layer that have a bias
    norms_heads: bool  # see `DecoderFamily`
    windows: tuple[int | None, ...]  # positions that a layer sees, by layer; None for all
    rotated: tuple[bool, ...]  # whether a layer rotates queries and keys, by layer
    frequencies: Tensor  # (head_dim / 2,) float32 angles between neighbouring positions
    rope_scale: float  # factor on cosines and sines

    @property
    def layers(self) -> int:
        return len(self.windows)


def decoder_facts(config: Any) -> DecoderFacts | str:
    """Read the facts of transformers' configuration; or why a target has others, as a clause."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"treeflash has no layers of its own for {config.model_type} models"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads < 1 or kv_heads < 1:
        return "it has no heads"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = config.num_hidden_layers
    rope = getattr(config, "rope_parameters", None) or {}
    windows = _windows(config, family.windows)
    stored = find_format(config.to_dict())
    rotated = [True] * layers if family.rotated is None else getattr(config, family.rotated)
    reasons = {
        f"its activation is {config.hidden_act}": config.hidden_act != "silu",
        "heads cannot share its keys evenly": heads % kv_heads or head_dim % 2,
        "its rotary embeddings depend on a text's length": rope.get("rope_type") not in ROPE_TYPES,
        "its heads are rotated in part": rope.get("partial_rotary_factor", 1) != 1,
        "its windows have no size": windows is None,
        "a list has no entry for each of its layers": len(rotated) < layers,
        str(stored): isinstance(stored, str),
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        return reason
    assert windows is not None
    optional = (names for name, names in family.optional_biases.items() if getattr(config, name))
    frequencies, rope_scale = _frequencies(config, rope, head_dim)
    return DecoderFacts(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        ties_head=bool(config.tie_word_embeddings),
        biases=frozenset(family.biases).union(*optional),
        norms_heads=family.norms_heads,
        windows=windows,
        rotated=tuple(bool(x) for x in rotated[:layers]),
        frequencies=frequencies,
        rope_scale=rope_scale,
    )


def _windows(config: Any, rule: str | None) -> tuple[int | None, ...] | None:
    """Return the windows by layer; None if a layer lacks one that its type asks for."""
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    if rule is None:
        return (None,) * layers
    if rule == "all":
        return (window,) * layers
    slides: list[bool] = [kind == "sliding_attention" for kind in config.layer_types[:layers]]
    if len(slides) < layers or (any(slides) and not window):
        return None
    return tuple(window if x else None for x in slides)


def _frequencies(config: Any, rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Compute the frequencies and the scale as transformers does, to the last bit."""
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return 1.0 / rope["rope_theta"] ** exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # takes a second

    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    return frequencies, scale
