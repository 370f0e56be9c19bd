"""The records of the families of decoders that have layers of our own; see `model`.

A family is what `decoder_facts` reads from transformers' configuration of a model type, and what no
configuration says: where norms stand, which settings ask for biases, windows, factors and experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

QKV = "q_proj", "k_proj", "v_proj"
ATTENTION_GATE = "q_gate"
ATTENTION = *QKV, "o_proj"
NETWORK = "gate_proj", "up_proj", "down_proj"
DELTA_NET = "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"
"""The linear layers of a decoder's layer, by the names of their tensors; but gates of attention are
rows of the first, see `facts.StoredRows`."""
ROPE_TYPES = "default", "linear", "llama3", "yarn"
"""Rotary embeddings whose frequencies do not depend on the length of a text."""


@dataclass(frozen=True, kw_only=True)
class Norms:
    """The names of a layer's norms; None where a layer has none."""

    attention_input: str | None = "input_layernorm"
    attention_output: str | None = None
    network_input: str | None = "post_attention_layernorm"
    network_output: str | None = None


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The numbers that a model multiplies with, and the largest ones that it bounds by `tanh`."""

    embeddings: float = 1.0  # factor on the rows of the input table
    scores: float | None = None  # factor on attention's scores; None for 1 / sqrt(head_dim)
    sublayers: float = 1.0  # factor on what attention and network add to the residual
    logits: float = 1.0  # divisor of logits
    score_cap: float | None = None  # scores become cap * tanh(score / cap)
    logit_cap: float | None = None  # so do logits


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The networks among which a router chooses for each token."""

    count: int
    per_token: int  # networks that are chosen
    size: int  # numbers between a network's products
    sums_to_one: bool  # whether the weights of a token's networks are divided by their sum
    layers: frozenset[int]  # the layers with experts; the others have one network
    shared_size: int | None = None  # as `size`, of a network with a gate that all tokens have
    place: str = "mlp"
    names: tuple[str, str, str] = NETWORK


@dataclass(frozen=True, kw_only=True)
class DeltaNets:
    """The layers that read a state in place of keys and values: gated delta nets."""

    layers: frozenset[int]  # the layers with one; the others attend
    key_heads: int  # heads of queries and keys, each of which some heads of values share
    heads: int  # heads of values
    key_dim: int
    value_dim: int
    kernel: int  # inputs that the convolution of a row reads, its own included
    joins_heads: bool  # whether a checkpoint has the rows of all projections by head of keys

    @property
    def channels(self) -> int:
        """The numbers that are convolved: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """What a model type has, and which of its settings decide about it."""

    biases: tuple[str, ...] = ()  # linear layers that have a bias
    # Linear layers that have a bias if a setting of this name asks for it.
    optional_biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norms: Norms = Norms()
    norm_offset: float = 0.0  # number that is added to the weights of all norms
    # Queries and keys may be normed before the rotation: "each" head, or "all" heads as one.
    norms_heads: str | None = None
    # The layers with a window: none, "all" if there is a window, or by "layer_types".
    windows: str | None = None
    rotated: str | None = None  # the setting that lists which layers rotate; None if all do
    rope_types: tuple[str, ...] = ROPE_TYPES
    rotates_parts: bool = False  # whether a setting says which part of a head is rotated
    rotates_pairs: bool = False  # whether neighbouring numbers turn, not ones half a head away
    factors: Callable[[Any], Factors] = lambda config: Factors()
    experts: Callable[[Any], Experts | None] = lambda config: None
    gates_attention: bool = False  # whether `q_proj` also has a gate for each number of a head
    delta_nets: Callable[[Any], DeltaNets | None] = lambda config: None


def _delta_nets(config: Any, *, joins_heads: bool = False) -> DeltaNets:
    kinds = config.layer_types[: config.num_hidden_layers]
    return DeltaNets(
        layers=frozenset(n for n, kind in enumerate(kinds) if kind == "linear_attention"),
        key_heads=config.linear_num_key_heads,
        heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        kernel=config.linear_conv_kernel_dim,
        joins_heads=joins_heads,
    )


def _qwen_experts(config: Any) -> Experts:
    layers = range(config.num_hidden_layers)
    step, dense = config.decoder_sparse_step, config.mlp_only_layers
    return Experts(
        count=config.num_experts,
        per_token=config.num_experts_per_tok,
        size=config.moe_intermediate_size,
        sums_to_one=config.norm_topk_prob,
        layers=frozenset(n for n in layers if n not in dense and (n + 1) % (step or 1) == 0),
    )


_LLAMA_BIASES = {"attention_bias": ATTENTION, "mlp_bias": NETWORK}
_ATTENTION_BIASES = {"attention_bias": ATTENTION}
_GEMMA_NORMS = Norms(
    attention_output="post_attention_layernorm",
    network_input="pre_feedforward_layernorm",
    network_output="post_feedforward_layernorm",
)
_OLMO_NORMS = Norms(
    attention_input=None,
    attention_output="post_attention_layernorm",
    network_input=None,
    network_output="post_feedforward_layernorm",
)


def _shared_qwen_experts(config: Any) -> Experts:
    return replace(_qwen_experts(config), shared_size=config.shared_expert_intermediate_size)


def _qwen3_5_experts(config: Any) -> Experts:
    return Experts(
        count=config.num_experts,
        per_token=config.num_experts_per_tok,
        size=config.moe_intermediate_size,
        sums_to_one=True,
        layers=frozenset(range(config.num_hidden_layers)),
        shared_size=config.shared_expert_intermediate_size,
    )


_QWEN3_5 = DecoderFamily(
    optional_biases=_ATTENTION_BIASES,
    norm_offset=1.0,
    norms_heads="each",
    rotates_parts=True,
    gates_attention=True,
    delta_nets=_delta_nets,
)
FAMILIES = {
    "gemma2": DecoderFamily(
        optional_biases=_ATTENTION_BIASES,
        norms=_GEMMA_NORMS,
        norm_offset=1.0,
        windows="layer_types",
        factors=lambda config: Factors(
            embeddings=config.hidden_size**0.5,
            scores=config.query_pre_attn_scalar**-0.5,
            score_cap=config.attn_logit_softcapping,
            logit_cap=config.final_logit_softcapping,
        ),
    ),
    "gemma3_text": DecoderFamily(
        optional_biases=_ATTENTION_BIASES,
        norms=_GEMMA_NORMS,
        norm_offset=1.0,
        norms_heads="each",
        windows="layer_types",
        factors=lambda config: Factors(
            embeddings=config.hidden_size**0.5,
            scores=config.query_pre_attn_scalar**-0.5,
            logit_cap=config.final_logit_softcapping,
        ),
    ),
    "glm": DecoderFamily(
        optional_biases={"attention_bias": QKV}, rotates_parts=True, rotates_pairs=True
    ),
    "glm4": DecoderFamily(
        optional_biases={"attention_bias": QKV},
        norms=Norms(
            attention_output="post_self_attn_layernorm", network_output="post_mlp_layernorm"
        ),
        rotates_parts=True,
        rotates_pairs=True,
    ),
    "granite": DecoderFamily(
        optional_biases=_LLAMA_BIASES,
        factors=lambda config: Factors(
            embeddings=config.embedding_multiplier,
            scores=config.attention_multiplier,
            sublayers=config.residual_multiplier,
            logits=config.logits_scaling,
        ),
    ),
    "llama": DecoderFamily(optional_biases=_LLAMA_BIASES),
    "mistral": DecoderFamily(windows="all"),
    "mixtral": DecoderFamily(
        windows="all",
        experts=lambda config: Experts(
            count=config.num_local_experts,
            per_token=config.num_experts_per_tok,
            size=config.intermediate_size,
            sums_to_one=True,
            layers=frozenset(range(config.num_hidden_layers)),
            place="block_sparse_moe",
            names=("w1", "w3", "w2"),
        ),
    ),
    "olmo2": DecoderFamily(optional_biases=_ATTENTION_BIASES, norms=_OLMO_NORMS, norms_heads="all"),
    "olmo3": DecoderFamily(
        optional_biases=_ATTENTION_BIASES,
        norms=_OLMO_NORMS,
        norms_heads="all",
        windows="layer_types",
    ),
    "olmoe": DecoderFamily(
        optional_biases=_ATTENTION_BIASES,
        norms_heads="all",
        experts=lambda config: Experts(
            count=config.num_experts,
            per_token=config.num_experts_per_tok,
            size=config.intermediate_size,
            sums_to_one=config.norm_topk_prob,
            layers=frozenset(range(config.num_hidden_layers)),
        ),
    ),
    # longrope has one set of frequencies for all positions that such a target has; see
    # `target.max_positions`.
    "phi3": DecoderFamily(windows="all", rope_types=("default", "longrope"), rotates_parts=True),
    "qwen2": DecoderFamily(biases=QKV, windows="layer_types"),
    "qwen3": DecoderFamily(
        optional_biases=_ATTENTION_BIASES, norms_heads="each", windows="layer_types"
    ),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), _QWEN3_5),
    **dict.fromkeys(
        ("qwen3_5_moe", "qwen3_5_moe_text"), replace(_QWEN3_5, experts=_qwen3_5_experts)
    ),
    "qwen3_moe": DecoderFamily(
        optional_biases=_ATTENTION_BIASES,
        norms_heads="each",
        windows="all",
        experts=_qwen_experts,
    ),
    "qwen3_next": replace(
        _QWEN3_5,
        experts=_shared_qwen_experts,
        delta_nets=partial(_delta_nets, joins_heads=True),
    ),
    "smollm3": DecoderFamily(
        optional_biases=_LLAMA_BIASES, windows="layer_types", rotated="no_rope_layers"
    ),
}
"""The families, by model type."""
