"""Heads that draft depth by depth: what MTP and EAGLE-3 heads are, and their tensors.

An MTP head is one transformer layer over *rows*, and so is an EAGLE-3 head. Row i reads the
embedding of the token at position i + 1 and the target's state at position i, and predicts the
token at position i + 2. A drafted token becomes a row with the state that the head computed at its
parent's row, so every depth costs one pass of the layer and of the output head.

Gemma 4's assistant has several layers and no rows: they read the keys and values of the target's
committed positions, so that the state which a draft passes on is all that its children need.

`treeflash.drafters.mtp_formats` has the formats in which they are published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from treeflash.config import LoadConfig
from treeflash.drafters import backbone
from treeflash.drafters.config import DrafterShape
from treeflash.drafters.format import Config, Shapes
from treeflash.errors import ConfigError, UnsupportedModelError

Tensor = TypeVar("Tensor")
DEPTHS = 8
"""Depths that an MTP head drafts at most. Each costs a pass, and acceptance falls with depth."""
MAX_PATHS = 16
"""Paths that are expanded at each depth at most; EAGLE-2's published trees expand 8 to 10."""
NO_MARGINALS = (
    "methods dflash and ddtree need a drafter that predicts all depths in one pass; with an MTP or "
    "EAGLE-3 head use method treeflash or treeflash-chain"
)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in an MTP head's layer."""

    count: int  # experts, of which `per_token` run for a token
    per_token: int
    width: int  # inner width of an expert
    shared_width: int  # inner width of the expert that runs for every token
    shared_gate: bool  # whether the shared expert is weighed by a sigmoid of its own
    sigmoid: bool  # whether the router's scores are sigmoids, chosen with a bias; else a softmax
    normalised: bool  # whether the weights of a token's experts are divided by their sum
    scale: float = 1.0  # factor on these weights
    groups: int = 1  # the experts of a row are in the best `chosen_groups` of these groups
    chosen_groups: int = 1


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Latent attention (DeepSeek-V2, arXiv 2405.04434): the widths of its projections.

    The KV cache has a latent for all heads, and a rotary key of `MtpConfig.head_dim` numbers.
    """

    query_rank: int  # inner width of the queries' projection; 0 for a plain one
    rank: int  # width of the latent
    key_dim: int  # width of the part of a key that follows from the latent
    value_dim: int
    interleaved: bool  # whether rotary pairs are neighbouring channels
    scale: float  # factor on the scores


@dataclass(frozen=True, kw_only=True)
class Assistant:
    """The layers of Gemma 4's assistant, which attend to the target's keys."""

    settings: Config  # the settings of the layers, `text_config` in `config.json`
    clusters: int = 0  # of tokens, of which the best get logits; 0 if all tokens get logits
    scored: int = 0  # number of clusters that get logits


@dataclass(frozen=True, kw_only=True)
class MtpConfig(DrafterShape):
    """The shape of a head that drafts depth by depth."""

    # the layer's attention reads the normed embedding and state side by side (EAGLE-3), instead of
    # a projection of both (MTP)
    reads_both: bool
    # the residual of that attention is the normed state, not the state
    normed_residual: bool = False
    normed_feedback: bool  # the state for the next depth is taken after the final norm
    qk_norm: bool = False  # queries and keys are normed by head
    output_bias: bool = False  # `o_proj` has a bias, as q, k and v have with `attention_bias`
    experts: Experts | None = None  # the experts of the feed-forward network; None for a dense one
    latent: Latent | None = None  # None for attention with keys and values of each head
    # norms before `fc`: of each feature, of all features together, or none
    feature_norms: Literal["each", "all"] | None = None
    # the states come after the target's final norm; else from `target_layer_ids` and through `fc`
    final_state: bool = False
    # P-EAGLE: all depths come from one pass, over the root's row and rows of this token; None for
    # heads that draft depth by depth
    mask_token_id: int | None = None
    parallel_depths: int = 0  # of P-EAGLE
    # the layers of Gemma 4's assistant, which has no layer with keys of its own
    # (`num_hidden_layers` is 0); None for other heads
    assistant: Assistant | None = None

    @property
    def depths(self) -> int:
        return self.parallel_depths or DEPTHS

    @property
    def has_marginals(self) -> bool:
        return self.mask_token_id is not None

    @property
    def scratch_rows(self) -> int:
        if self.has_marginals:
            return self.depths
        return 0 if self.assistant else 1 + MAX_PATHS * (self.depths - 1)

    @property
    def column_size(self) -> int:
        # A fork at any length needs the target's state at the position before.
        if self.latent is not None:
            return self.latent.rank + self.head_dim + self.hidden_size
        return super().column_size + self.hidden_size

    @property
    def attention_scale(self) -> float:
        """Factor on the scores of the attention."""
        if self.gemma4:
            return 1.0
        return self.head_dim**-0.5 if self.latent is None else self.latent.scale


def refuse_window(config: LoadConfig) -> None:
    """Raise a ConfigError for a window on the rows."""
    if config.draft_window is not None:
        raise ConfigError("draft_window is not supported with MTP and EAGLE-3 heads; remove it")


def refuse_missing_targets(config: DrafterShape, backend: str) -> None:
    """Raise an UnsupportedModelError for a drafter of targets that only the mlx backend runs."""
    if not isinstance(config, MtpConfig):
        return
    for name, part in (
        ("Gemma 4's assistant", config.assistant),
        ("a head with latent attention", config.latent),
    ):
        if part is not None:
            raise UnsupportedModelError(
                f"{name} is not supported by the {backend} backend; use the mlx backend"
            )


def first_visible(config: MtpConfig, length: int, depth: int) -> int:
    """Return the first of `length` committed rows that rows of a depth see; the root's is last."""
    (window,) = config.sliding_windows
    return 0 if window is None else min(max(length + depth - window, 0), length)


def hidden_depths(config: MtpConfig, depth: int) -> int:
    """Return at how many of the first depths drafted rows are too far to be seen from a depth."""
    (window,) = config.sliding_windows
    return 0 if window is None else max(depth - window, 0)


def mtp_shapes(config: MtpConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of an MTP head by name, optional ones included."""
    if config.assistant is not None:
        return _assistant_shapes(config, config.assistant, vocab_size)
    h = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embedding_norm.weight": (h,),
        "hidden_norm.weight": (h,),
        "norm.weight": (h,),
        **_attention_shapes("layer.", config, 2 * h if config.reads_both else h),
    }
    for n in range(config.num_hidden_layers - 1):
        layer = f"further_layers.{n}."
        shapes |= _attention_shapes(layer, config, h)
        shapes |= _mlp_shapes(f"{layer}mlp.", h, config.intermediate_size)
        shapes[f"{layer}input_layernorm.weight"] = (h,)
    if config.has_marginals:
        shapes["mask_hidden"] = (1, 1, len(config.target_layer_ids) * h)
    if config.reads_both:
        features = len(config.target_layer_ids)
        shapes["fc.weight"] = (h, features * h)
        if config.feature_norms == "all":
            shapes["input_norm.weight"] = (features * h,)
        if config.feature_norms == "each":
            shapes |= {f"fc_norm.{i}.weight": (h,) for i in range(features)}
    else:
        shapes |= {"input_proj.weight": (h, 2 * h), "layer.input_layernorm.weight": (h,)}
    if (experts := config.experts) is None:
        shapes |= _mlp_shapes("layer.mlp.", h, config.intermediate_size)
    else:
        shapes["layer.mlp.gate.weight"] = (experts.count, h)
        if experts.sigmoid:
            shapes["layer.mlp.gate.e_score_correction_bias"] = (experts.count,)
        if experts.shared_width:
            shapes |= _mlp_shapes("layer.mlp.shared_expert.", h, experts.shared_width)
        if experts.shared_gate:
            shapes["layer.mlp.shared_expert_gate.weight"] = (1, h)
        for i in range(experts.count):
            shapes |= _mlp_shapes(f"layer.mlp.experts.{i}.", h, experts.width)
    if config.own_vocabulary:
        shapes["embed_tokens.weight"] = (vocab_size, h)
        shapes["lm_head.weight"] = (config.draft_vocab_size or vocab_size, h)
        if config.draft_vocab_size:
            shapes["d2t"] = (config.draft_vocab_size,)
    return shapes


def _attention_shapes(layer: str, config: MtpConfig, read: int) -> Shapes:
    """Return the shapes of a layer's attention, which reads `read` numbers, and of its norm."""
    h, d = config.hidden_size, config.head_dim
    if (latent := config.latent) is not None:
        heads, rank = config.num_attention_heads, latent.query_rank
        query, both = heads * (latent.key_dim + d), latent.key_dim + latent.value_dim
        inner = {"q_a_proj.weight": (rank, read), "q_a_layernorm.weight": (rank,)}
        widths = (inner if rank else {}) | {
            "q_b_proj.weight": (query, rank or read),
            "kv_a_layernorm.weight": (latent.rank,),
            "kv_a_proj_with_mqa.weight": (latent.rank + d, read),
            "kv_b": (heads * both, latent.rank),
            "o_proj.weight": (h, heads * latent.value_dim),
        }
        named = {f"{layer}self_attn.{name}": shape for name, shape in widths.items()}
        return {f"{layer}post_attention_layernorm.weight": (h,), **named}
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    shapes: Shapes = {f"{layer}post_attention_layernorm.weight": (h,)}
    if config.gemma4:
        shapes |= {f"{layer}{name}.weight": (h,) for name in backbone.NORMS[2:]}
        shapes[f"{layer}layer_scalar"] = (1,)
    projections = {"q": (q * (2 if config.gated else 1), read), "k": (kv, read), "v": (kv, read)}
    if config.keys_are_values:
        del projections["v"]
    for name, shape in {**projections, "o": (h, q)}.items():
        shapes[f"{layer}self_attn.{name}_proj.weight"] = shape
        if config.output_bias if name == "o" else config.attention_bias:
            shapes[f"{layer}self_attn.{name}_proj.bias"] = shape[:1]
    if config.qk_norm:
        shapes |= {f"{layer}self_attn.{name}_norm.weight": (d,) for name in "qk"}
    return shapes


def _assistant_shapes(
    config: MtpConfig, assistant: Assistant, vocab_size: int
) -> dict[str, tuple[int, ...]]:
    settings, h = assistant.settings, config.hidden_size
    width, inner = int(settings["hidden_size"]), int(settings["intermediate_size"])
    sizes = {"sliding_attention": int(settings["head_dim"])}
    sizes["full_attention"] = int(settings.get("global_head_dim") or settings["head_dim"])
    shapes: dict[str, tuple[int, ...]] = {
        "pre_projection.weight": (width, 2 * h),
        "post_projection.weight": (h, width),
        "norm.weight": (width,),
        "lm_head.weight": (vocab_size, width),
    }
    if assistant.clusters:
        shapes["masked_embedding.centroids.weight"] = (assistant.clusters, width)
        shapes["masked_embedding.token_ordering"] = (vocab_size,)
    for n, kind in enumerate(settings["layer_types"]):
        layer, size = f"layers.{n}.", sizes[kind]
        queries = int(settings["num_attention_heads"]) * size
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (queries, width),
            f"{layer}self_attn.q_norm.weight": (size,),
            f"{layer}self_attn.o_proj.weight": (width, queries),
            f"{layer}layer_scalar": (1,),
            **_mlp_shapes(f"{layer}mlp.", width, inner),
            **{f"{layer}{name}.weight": (width,) for name in backbone.NORMS},
        }
    return shapes


def _mlp_shapes(prefix: str, h: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate_proj": (width, h), "up_proj": (width, h), "down_proj": (h, width)}
    return {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}


def required_and_optional(
    config: MtpConfig, vocab_size: int, stored: Shapes
) -> tuple[Shapes, Shapes]:
    """Return the shapes of the tensors that a folder must have, and of optional ones."""
    shapes = mtp_shapes(config, vocab_size)
    names = set() if config.has_marginals else {"embed_tokens.weight"}  # the mask's is its own
    if "d2t" not in shapes and "pre_projection.weight" not in shapes:
        names.add("lm_head.weight")
    optional = {name: shape for name, shape in shapes.items() if name in names}
    return {x: shape for x, shape in shapes.items() if x not in names}, optional


STACKED = "layer.mlp.experts."
FUSED = "layer.mlp.experts.gate_up_proj"
FUSED_DOWN = "layer.mlp.experts.down_proj"


def split_fused(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Split the shapes of experts that are stored together, as if each was a tensor of its own."""
    split = dict(shapes)
    for name in ("gate_proj", "up_proj", "down_proj") if f"{STACKED}gate_proj" in split else ():
        count, *shape = split.pop(f"{STACKED}{name}", (0,))
        split |= {f"{STACKED}{i}.{name}.weight": tuple(shape) for i in range(count)}
    if FUSED in split and FUSED_DOWN in split:
        (count, both, h), (_, _, width) = split.pop(FUSED), split.pop(FUSED_DOWN)
        for i in range(count):
            split |= _mlp_shapes(f"layer.mlp.experts.{i}.", h, both // 2)
            split[f"layer.mlp.experts.{i}.down_proj.weight"] = (h, width)
    return split


def stack_experts(
    tensors: dict[str, Any], config: MtpConfig, stack: Callable[[list[Any]], Any]
) -> dict[str, Any]:
    """Return the tensors with (count, out, in) `layer.mlp.experts.{gate,up,down}_proj`."""
    if config.experts is None or f"{STACKED}gate_proj" in tensors:
        return tensors
    if FUSED in tensors:
        fused = tensors.pop(FUSED)
        tensors["layer.mlp.experts.gate_proj"] = fused[:, : config.experts.width]
        tensors["layer.mlp.experts.up_proj"] = fused[:, config.experts.width :]
        return tensors
    for name in ("gate_proj", "up_proj", "down_proj"):
        parts = [
            tensors.pop(f"layer.mlp.experts.{i}.{name}.weight") for i in range(config.experts.count)
        ]
        tensors[f"layer.mlp.experts.{name}"] = stack(parts)
    return tensors
