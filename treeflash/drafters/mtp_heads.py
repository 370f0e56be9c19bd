"""Heads that draft depth by depth: MTP heads and EAGLE-3, their formats and their tensors.

An MTP head is one transformer layer over *rows*, and so is an EAGLE-3 head. Row i reads the
embedding of the token at position i + 1 and the target's state at position i, and predicts the
token at position i + 2. A drafted token becomes a row with the state that the head computed at its
parent's row, so every depth costs one pass of the layer and of the output head.

| family | who publishes it | how it is recognised |
| --- | --- | --- |
| Qwen MTP | Qwen3-Next, 3.5, 3.6, 3.8, in the target's folder | `mtp.fc.weight` |
| GLM MTP | GLM-4.5 to 4.7, DeepSeek-V3, in the target's folder | `model.layers.N.eh_proj.weight` |
| EAGLE-3 | SafeAILab, SpecForge, ModelOpt | architecture `LlamaForCausalLMEagle3` |
| Qwen MTP | speculators | `speculators_model_type` `mtp` |
| EAGLE-3 | DeepSpec | architecture `Qwen3Eagle3Model` |
| EAGLE-3 | speculators | `speculators_model_type` `eagle3` |
| P-EAGLE | speculators | `speculators_model_type` `peagle` |
| Gemma 4's assistant | Google | `model_type` `gemma4_assistant` |

Gemma 4's assistant has several layers and no rows: they read the keys and values of the target's
committed positions, so that the state which a draft passes on is all that its children need.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from treeflash.config import LoadConfig
from treeflash.drafters import backbone
from treeflash.drafters.config import DrafterShape, inverse_frequencies, rope_parameters
from treeflash.drafters.format import Config, Format, Names, Shapes
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
TARGET_TENSORS = ("embed_tokens.weight", "shared_head.head.weight")
"""Copies of the target's tensors in a layer of the DeepSeek-V3 layout."""


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
        return self.head_dim**-0.5 if self.latent is None else self.latent.scale


REFUSED_TENSORS = {
    r"mtp\.fc_(hidden|embedding)\.weight": "Qwen4",
    r"mtp\.0\.": "DeepSeek-V4",
    r"model\.mtp_layers\.0\.input_proj\.weight": "MiMo",
    r"model\.mtp\.layers\.0\.eh_proj\.weight": "MiMo-V2",
    r"mtp\.layers\.0\.eh_proj\.weight": "Nemotron-H",
    r"mtp_layers\.0\.input_proj\.weight": "speculators",
}
"""Patterns of the tensors of MTP heads that are not supported, and who publishes them."""
QWEN_TYPES = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
GLM_TYPES = ("glm4_moe", "glm4_moe_lite", "deepseek_v3")
QWEN_SIDECARS = ("qwen3_5_mtp", "qwen3_5_moe_mtp")
"""Folders with the head alone: names without `mtp.`, and norms that have the 1 in their weights."""


def detect(config: Config, stored: Collection[str]) -> Format | None:
    """Tell the format of the head in a folder; None if the folder holds none.

    Raises an UnsupportedModelError if the head is of a family that is not supported.
    """
    found = next((format_ for format_ in MTP_FORMATS if format_.detect(config, stored)), None)
    if found is None:
        for pattern, family in REFUSED_TENSORS.items():
            if any(re.match(pattern, name) for name in stored):
                raise UnsupportedModelError(
                    f"MTP heads in the layout of {family} are not supported"
                )
    return found


def _is_speculators_mtp(config: Config, stored: Collection[str]) -> bool:
    found = config.get("speculators_model_type") == "mtp"
    return found and _is_supported(config["transformer_layer_config"], QWEN_TYPES)


def _is_deepspec_eagle(config: Config, stored: Collection[str]) -> bool:
    architectures = config.get("architectures") or ()
    if "Gemma4Eagle3Model" in architectures:
        raise UnsupportedModelError(
            "the layout Gemma4Eagle3Model (DeepSpec's for Gemma 4) is not supported"
        )
    return "Qwen3Eagle3Model" in architectures


def _is_eagle(config: Config, stored: Collection[str]) -> bool:
    return any("eagle3" in str(name).lower() for name in config.get("architectures") or ())


def _is_qwen_sidecar(config: Config, stored: Collection[str]) -> bool:
    return config.get("model_type") in QWEN_SIDECARS and "pre_fc_norm_hidden.weight" in stored


def _is_qwen(config: Config, stored: Collection[str]) -> bool:
    found = {"mtp.fc.weight", "mtp.pre_fc_norm_hidden.weight"} <= set(stored)
    return found and _is_supported(config, QWEN_TYPES)


def _is_glm(config: Config, stored: Collection[str]) -> bool:
    last = f"model.layers.{text_config(config).get('num_hidden_layers')}.eh_proj.weight"
    return last in stored and _is_supported(config, GLM_TYPES)


def _is_supported(config: Config, known: Collection[str]) -> bool:
    """Return True; an UnsupportedModelError for a head of a family that is not among some."""
    kind = str(text_config(config).get("model_type"))
    if kind not in known:
        raise UnsupportedModelError(
            f"the MTP head of {kind} models is not supported; supported are {', '.join(known)}"
        )
    return True


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


def hidden_rows(config: MtpConfig, sizes: Sequence[int], depth: int) -> int:
    """Return how many of the first drafted rows are too far from rows of a depth to be seen.

    `sizes` are the numbers of rows of the depths before.
    """
    (window,) = config.sliding_windows
    return 0 if window is None else sum(sizes[: max(depth - window, 0)])


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
    projections = {"q": (q * (2 if config.gated else 1), read), "k": (kv, read), "v": (kv, read)}
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


def _required_and_optional(
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


def text_config(config: Config) -> Config:
    """Return the settings of the language model in a `config.json`."""
    return {**config, **(config.get("text_config") or {})}


def _layer_config(config: Config, **settings: Any) -> MtpConfig:
    """Return the fields that describe one layer; `config` is the section that has its settings."""
    backbone.refuse(config, {"hidden_act": (None, "silu"), "mlp_bias": (None, False)})
    heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden_size // heads)
    rope = rope_parameters(config)
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    inv_freq, rope_scale = inverse_frequencies(rope, int(head_dim * (share or 1.0)))
    return MtpConfig(
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        rms_norm_eps=float(config["rms_norm_eps"]),
        attention_bias=bool(config.get("attention_bias", False)),
        vocab_size=int(config["vocab_size"]),
        inv_freq=tuple(inv_freq.tolist()),
        rope_scale=rope_scale,
        **{"num_hidden_layers": 1, "sliding_windows": (None,), "causal": (True,), **settings},
    )


def _parse_qwen(
    config: Config,
    stored: Collection[str],
    target_layers: int,
    *,
    prefix: str = "mtp.",
    offset: float = 1.0,
) -> MtpConfig:
    """Set full attention, whatever the target's last layer is."""
    text = text_config(config)
    _refuse_keys(
        text,
        lambda key: key.startswith("mtp_"),
        {"mtp_num_hidden_layers": (1,), "mtp_use_dedicated_embeddings": (False,)},
    )
    experts = None
    if f"{prefix}layers.0.mlp.gate.weight" in stored:
        experts = Experts(
            count=int(text["num_experts"]),
            per_token=int(text["num_experts_per_tok"]),
            width=int(text["moe_intermediate_size"]),
            shared_width=int(text["shared_expert_intermediate_size"]),
            shared_gate=True,
            sigmoid=False,
            normalised=bool(text.get("norm_topk_prob", True)),
        )
    return _layer_config(
        text,
        intermediate_size=0 if experts else int(text["intermediate_size"]),
        target_layer_ids=(target_layers,),
        num_target_layers=int(text["num_hidden_layers"]),
        final_state=True,
        head="mtp",
        reads_both=False,
        normed_feedback=True,
        gated=True,
        qk_norm=True,
        output_bias=bool(text.get("attention_bias", False)),
        experts=experts,
        norm_offset=offset,
    )


def _qwen_names(config: Config, stored: Collection[str], *, prefix: str = "mtp.") -> Names:
    renamed = {
        "fc": "input_proj",
        "pre_fc_norm_embedding": "embedding_norm",
        "pre_fc_norm_hidden": "hidden_norm",
    }
    names = {}
    for name in stored:
        if name.startswith(prefix):
            first, _, rest = name.removeprefix(prefix).partition(".")
            canonical = f"{renamed.get(first, first)}.{rest}".replace("layers.0.", "layer.", 1)
            # MLX stacks the experts.
            names[name] = re.sub(r"\.switch_mlp\.(\w+)\.weight$", r".experts.\1", canonical)
    return names


def _parse_speculators_mtp(
    config: Config, stored: Collection[str], target_layers: int
) -> MtpConfig:
    """Qwen's head, with the settings of the target's layers in a section of their own."""
    known = backbone.INERT_KEYS | SPECULATORS_INERT
    _refuse_keys(config, lambda key: key not in known, {"num_nextn_predict_layers": (1,)})
    return _parse_qwen(config["transformer_layer_config"], stored, target_layers, prefix="mtp_")


def _speculators_mtp_names(config: Config, stored: Collection[str]) -> Names:
    renamed = {
        "token_layernorm": "embedding_norm",
        "hidden_layernorm": "hidden_norm",
        "input_proj": "input_proj",
        "final_layernorm": "norm",
    }
    names = {}
    for name in stored:
        part = name.removeprefix("mtp_layers.0.")
        module = part.removesuffix(".weight")
        names[name] = f"{renamed[module]}.weight" if module in renamed else f"layer.{part}"
    return names


def _parse_glm(config: Config, stored: Collection[str], target_layers: int) -> MtpConfig:
    """GLM-4.5 to 4.7 and DeepSeek-V3: a layer like the target's mixtures, behind its last one."""
    _refuse_keys(
        config,
        lambda key: "nextn" in key or "mtp" in key,
        {"num_nextn_predict_layers": (1,), "num_mtp_modules": (1,)},
    )
    layers, width = int(config["num_hidden_layers"]), int(config["moe_intermediate_size"])
    count, groups = int(config["n_routed_experts"]), int(config.get("n_group") or 1)
    chosen = int(config.get("topk_group") or 1)
    if count % groups:
        raise ValueError(f"n_group = {groups} is not supported with {count} experts")
    if not 0 < chosen <= groups:
        raise ValueError(f"topk_group = {chosen} is not supported with {groups} groups")
    latent = _latent(config) if config.get("kv_lora_rank") else None
    if latent is not None:  # the rotated channels are a part of their own
        config = {**config, "head_dim": config["qk_rope_head_dim"], "partial_rotary_factor": 1.0}
    return _layer_config(
        config,
        latent=latent,
        intermediate_size=0,
        target_layer_ids=(target_layers,),
        num_target_layers=layers,
        final_state=True,
        head="mtp",
        reads_both=False,
        normed_feedback=True,
        qk_norm=bool(config.get("use_qk_norm", False)),
        experts=Experts(
            count=count,
            per_token=int(config["num_experts_per_tok"]),
            width=width,
            shared_width=width * int(config.get("n_shared_experts") or 0),
            shared_gate=False,
            sigmoid=True,
            normalised=bool(config.get("norm_topk_prob", True)),
            scale=float(config.get("routed_scaling_factor", 1.0)),
            groups=groups,
            chosen_groups=chosen,
        ),
    )


def _latent(config: Config) -> Latent:
    """Parse latent attention; stretched rotary embeddings scale the scores too."""
    backbone.refuse(config, {"attention_bias": (None, False)})
    rope, key_dim = rope_parameters(config), int(config["qk_nope_head_dim"])
    scale = (key_dim + int(config["qk_rope_head_dim"])) ** -0.5
    factor, weight = float(rope.get("factor") or 1), float(rope.get("mscale_all_dim") or 0)
    if factor > 1 and weight:
        scale *= (0.1 * weight * math.log(factor) + 1) ** 2
    return Latent(
        query_rank=int(config.get("q_lora_rank") or 0),
        rank=int(config["kv_lora_rank"]),
        key_dim=key_dim,
        value_dim=int(config["v_head_dim"]),
        interleaved=bool(config.get("rope_interleave", True)),
        scale=scale,
    )


def _glm_names(config: Config, stored: Collection[str]) -> Names:
    renamed = {
        "enorm": "embedding_norm",
        "hnorm": "hidden_norm",
        "eh_proj": "input_proj",
        "shared_head.norm": "norm",
    }
    prefix = f"model.layers.{config['num_hidden_layers']}."
    names = {}
    for name in stored:
        part = name.removeprefix(prefix)
        if part != name and part not in TARGET_TENSORS:
            module = part.removesuffix(".weight")
            canonical = f"{renamed[module]}.weight" if module in renamed else f"layer.{part}"
            canonical = canonical.replace("shared_experts.", "shared_expert.")
            # The mapping of the latents is no layer: its two parts are applied on either side.
            canonical = canonical.replace("self_attn.kv_b_proj.weight", "self_attn.kv_b")
            if not config.get("q_lora_rank") and config.get("kv_lora_rank"):
                canonical = canonical.replace("self_attn.q_proj.", "self_attn.q_b_proj.")
            names[name] = canonical
    return names


EAGLE_KEYS = {
    "draft_vocab_size",
    "eagle_aux_hidden_state_layer_ids",
    "eagle_config",
    "fc_norm",
    "norm_before_fc",
    "norm_before_residual",
    "norm_output",
    "num_aux_hidden_states",
    "target_hidden_size",
    "use_aux_norm",
}
EAGLE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "embed_requires_grad": (None, False, True),
    "mlp_bias": (None, False),
    "next_layer_regular": (None, True),
    "parallel_draft_step": (None, 1),
    "pretraining_tp": (None, 1),
    "use_aux_hidden_state": (None, True),
    "use_input_layernorm_in_first_layer": (None, True),
    "use_last_layernorm": (None, True),
    "use_mtp_layernorm": (None, False),
}
"""Keys that must have one of these values."""
DEEPSPEC_EAGLE_KEYS = {
    "step_loss_decay",  # of the training, as `ttt_length`
    "target_layer_ids",
    "target_model_name_or_path",
    "ttt_length",
}
SPECULATORS_INERT = {
    "speculators_config",
    "speculators_model_type",
    "speculators_version",
    "transformer_layer_config",
}


def _parse_eagle(config: Config, stored: Collection[str], target_layers: int) -> MtpConfig:
    """SafeAILab, SpecForge and ModelOpt: the settings of a Llama with one layer."""
    nested = config.get("eagle_config") or {}
    known = EAGLE_KEYS | backbone.KEYS | backbone.INERT_KEYS
    for section in (config, nested):
        _refuse_keys(section, lambda key: key not in known, EAGLE_NEUTRAL)
    ids = config.get("eagle_aux_hidden_state_layer_ids")
    if ids is not None:
        ids = [int(i) - 1 for i in ids]
    elif (ids := nested.get("eagle_aux_hidden_state_layer_ids")) is not None:
        ids = [int(i) for i in ids]  # the ids of the layers whose outputs are read
    return _eagle_config(config, config, ids or _default_layers(target_layers), stored)


def _parse_deepspec_eagle(config: Config, stored: Collection[str], target_layers: int) -> MtpConfig:
    """DeepSpec: a copy of the target's settings, and the ids of layers whose outputs are read."""
    known = DEEPSPEC_EAGLE_KEYS | backbone.KEYS | backbone.INERT_KEYS
    neutral = EAGLE_NEUTRAL | {"draft_num_hidden_layers": (None, 1)}
    _refuse_keys(config, lambda key: key not in known, neutral)
    return _eagle_config(config, config, [int(i) for i in config["target_layer_ids"]], stored)


def _parse_speculators(config: Config, stored: Collection[str], target_layers: int) -> MtpConfig:
    layers = config["transformer_layer_config"]
    known = EAGLE_KEYS | backbone.INERT_KEYS | SPECULATORS_INERT
    _refuse_keys(config, lambda key: key not in known, EAGLE_NEUTRAL)
    ids = [int(i) - 1 for i in config.get("eagle_aux_hidden_state_layer_ids") or ()]
    return _eagle_config(config, layers, ids or _default_layers(target_layers), stored)


def _parse_peagle(config: Config, stored: Collection[str], target_layers: int) -> MtpConfig:
    """P-EAGLE: EAGLE-3's rows, and behind them a row with the mask token for each further depth."""
    eagle = {key: value for key, value in config.items() if key != "mask_token_id"}
    layers = dict(config["transformer_layer_config"])
    count = int(layers["num_hidden_layers"])
    if any(backbone.sliding_layers(layers, count)):
        raise ValueError("P-EAGLE with a sliding window is not supported")
    layers |= {"num_hidden_layers": 1, "layer_types": None}
    methods = config["speculators_config"]["proposal_methods"]
    parsed = _parse_speculators(
        {**eagle, "transformer_layer_config": layers}, stored, target_layers
    )
    return replace(
        parsed,
        head=None,
        num_hidden_layers=count,
        sliding_windows=(None,) * count,
        causal=(True,) * count,
        mask_token_id=int(config["mask_token_id"]),
        parallel_depths=int(methods[0]["speculative_tokens"]),
    )


def _eagle_config(
    config: Config, layers: Config, layer_ids: Sequence[int], stored: Collection[str]
) -> MtpConfig:
    if int(layers["num_hidden_layers"]) != 1:
        raise ValueError(f"num_hidden_layers = {layers['num_hidden_layers']} is not supported")
    (sliding,) = backbone.sliding_layers(layers, 1)
    if not layers.get("layer_types") and layers.get("use_sliding_window"):
        raise ValueError("use_sliding_window without layer_types is not supported")
    backbone.refuse_adapter(config.get("target_hidden_size"), layers)
    if config.get("num_aux_hidden_states") not in (None, len(layer_ids)):
        raise ValueError(
            f"num_aux_hidden_states = {config['num_aux_hidden_states']} contradicts "
            f"{len(layer_ids)} layer ids"
        )
    each, whole = config.get("fc_norm") or config.get("use_aux_norm"), config.get("norm_before_fc")
    if each and whole:
        raise ValueError("fc_norm and norm_before_fc exclude each other")
    return _layer_config(
        layers,
        intermediate_size=int(layers["intermediate_size"]),
        target_layer_ids=tuple(layer_ids),
        num_target_layers=None,
        head="eagle3",
        reads_both=True,
        normed_residual=bool(config.get("norm_before_residual")),
        normed_feedback=bool(config.get("norm_output")),
        qk_norm=any(name.endswith("self_attn.q_norm.weight") for name in stored),
        output_bias=bool(layers.get("attention_bias", False)),
        feature_norms="each" if each else "all" if whole else None,
        own_vocabulary=True,
        draft_vocab_size=backbone.draft_vocab_size(config, layers),
        sliding_windows=(int(layers["sliding_window"]) if sliding else None,),
    )


def _default_layers(target_layers: int) -> list[int]:
    """Return the layers whose outputs enter layers 2, N / 2 and N - 3, if no ids are given."""
    return [1, target_layers // 2 - 1, target_layers - 4]


def _eagle_names(config: Config, stored: Collection[str]) -> Names:
    renamed = {"layer.hidden_norm": "hidden_norm", "layer.input_layernorm": "embedding_norm"}
    layers = config.get("transformer_layer_config") or config
    unused = {"t2d"} if backbone.draft_vocab_size(config, layers) else {"t2d", "d2t"}
    names = {}
    for name in stored:
        part = re.sub(r"^model\.", "", name)
        part = re.sub(r"^(midlayer|layers\.0)\.", "layer.", part)
        part = re.sub(r"^layers\.(\d+)", lambda n: f"further_layers.{int(n[1]) - 1}", part)
        if part not in unused and not part.startswith("verifier_"):
            module = part.removesuffix(".weight")
            names[name] = f"{renamed[module]}.weight" if module in renamed else part
    return names


def _refuse_keys(
    config: Config, selected: Callable[[str], bool], known: Mapping[str, Collection[Any]]
) -> None:
    """Raise a ValueError for the first selected setting with a value that is not known."""
    for key, value in config.items():
        if selected(key) and value not in (None, False) and value not in known.get(key, ()):
            raise ValueError(f"{key} = {value!r} is not supported")


ASSISTANT_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
ASSISTANT_KEYS = {
    "backbone_hidden_size",
    "centroid_intermediate_top_k",
    "num_centroids",
    "text_config",
    "use_ordered_embeddings",
}
ASSISTANT_LAYER_KEYS = {
    "attention_k_eq_v",  # of the target's keys, as the next two
    "num_global_key_value_heads",
    "num_key_value_heads",
    "final_logit_softcapping",  # the published code bounds no logits
    "global_head_dim",
    "num_kv_shared_layers",
    "sliding_window",
    "use_bidirectional_attention",  # of prompts; a draft sees committed positions alone
}
ASSISTANT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "hidden_act": (None,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_size_per_layer_input": (0,),
    "vocab_size_per_layer_input": (0,),
}
"""Settings of the layers that must have one of these values."""


def _parse_assistant(config: Config, stored: Collection[str], target_layers: int) -> MtpConfig:
    """Check the settings that the layers are computed from, as in the target."""
    settings = config["text_config"]

    def is_unknown(key: str, known: Collection[str]) -> bool:
        return key not in known and key not in backbone.INERT_KEYS and not key.endswith("_token_id")

    _refuse_keys(config, lambda key: is_unknown(key, ASSISTANT_KEYS), {})
    known = (ASSISTANT_LAYER_KEYS | backbone.KEYS) - ASSISTANT_NEUTRAL.keys()
    _refuse_keys(settings, lambda key: is_unknown(key, known), ASSISTANT_NEUTRAL)
    layers = int(settings["num_hidden_layers"])
    kinds = settings["layer_types"]
    if len(kinds) != layers or not set(kinds) <= set(backbone.LAYER_TYPES):
        raise ValueError(f"layer_types = {kinds!r} is not supported with {layers} layers")
    vocab_size, clusters, scored = int(settings["vocab_size"]), 0, 0
    if config.get("use_ordered_embeddings"):
        clusters = int(config["num_centroids"])
        scored = int(config["centroid_intermediate_top_k"])
        if vocab_size % clusters or not 0 < scored <= clusters:
            raise ValueError(
                f"{scored} of {clusters} clusters of {vocab_size} tokens are not valid"
            )
    return MtpConfig(
        hidden_size=int(config["backbone_hidden_size"]),
        intermediate_size=int(settings["intermediate_size"]),
        num_hidden_layers=0,
        num_attention_heads=int(settings["num_attention_heads"]),
        num_key_value_heads=int(settings["num_key_value_heads"]),
        head_dim=int(settings["head_dim"]),
        rms_norm_eps=float(settings["rms_norm_eps"]),
        attention_bias=False,
        vocab_size=vocab_size,
        target_layer_ids=(target_layers,),
        num_target_layers=None,
        inv_freq=(),
        rope_scale=1.0,
        sliding_windows=(),
        causal=(),
        head="assistant",
        own_vocabulary=True,
        reads_both=False,
        normed_feedback=True,
        final_state=True,
        assistant=Assistant(settings=settings, clusters=clusters, scored=scored),
    )


def _assistant_names(config: Config, stored: Collection[str]) -> Names:
    names = {name: name.removeprefix("model.") for name in stored if name != "lm_head.weight"}
    embeddings = "model.embed_tokens.weight"  # of the drafted tokens: the output head, tied
    return {**names, embeddings: "lm_head.weight"} if embeddings in names else names


_mtp = partial(Format, kind="rows", shapes=_required_and_optional)
QWEN_MTP = _mtp(name="Qwen MTP", detect=_is_qwen, parse=_parse_qwen, names=_qwen_names)
QWEN_SIDECAR = _mtp(
    name="Qwen MTP",
    detect=_is_qwen_sidecar,
    parse=partial(_parse_qwen, prefix="", offset=0.0),
    names=partial(_qwen_names, prefix=""),
)
GLM_MTP = _mtp(name="GLM MTP", detect=_is_glm, parse=_parse_glm, names=_glm_names)
SPECULATORS_MTP = _mtp(
    name="Qwen MTP",
    detect=_is_speculators_mtp,
    parse=_parse_speculators_mtp,
    names=_speculators_mtp_names,
)
DEEPSPEC_EAGLE3 = _mtp(
    name="EAGLE-3",
    detect=_is_deepspec_eagle,
    parse=_parse_deepspec_eagle,
    names=_eagle_names,
)
EAGLE3 = _mtp(name="EAGLE-3", detect=_is_eagle, parse=_parse_eagle, names=_eagle_names)
SPECULATORS_EAGLE3 = _mtp(
    name="EAGLE-3",
    detect=lambda config, stored: config.get("speculators_model_type") == "eagle3",
    parse=_parse_speculators,
    names=_eagle_names,
)
PEAGLE = _mtp(
    name="P-EAGLE",
    detect=lambda config, stored: config.get("speculators_model_type") == "peagle",
    parse=_parse_peagle,
    names=_eagle_names,
)
ASSISTANT = _mtp(
    name="Gemma 4's assistant",
    detect=lambda config, stored: config.get("model_type") in ASSISTANT_TYPES,
    parse=_parse_assistant,
    names=_assistant_names,
)
MTP_FORMATS = (
    SPECULATORS_EAGLE3,
    PEAGLE,
    SPECULATORS_MTP,
    DEEPSPEC_EAGLE3,
    EAGLE3,
    QWEN_SIDECAR,
    ASSISTANT,
    QWEN_MTP,
    GLM_MTP,
)
"""In the order in which a folder is tried."""
