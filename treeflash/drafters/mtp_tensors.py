"""The tensors of heads that draft depth by depth: their shapes, and the layouts of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from treeflash.drafters.format import Shapes, as_outline, shapes_of, swiglu
from treeflash.drafters.mtp_heads import Assistant, MtpConfig
from treeflash.drafters.mtp_layer import MtpLayer

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
"""The norms of Gemma 4's layers."""


def mtp_shapes(config: MtpConfig, vocab_size: int) -> Shapes:
    """Return the shapes of all tensors of an MTP head by name, optional ones included."""
    if config.assistant is not None:
        return _assistant_shapes(config, config.assistant, vocab_size)
    shapes = shapes_of(as_outline(MtpLayer)(config))
    if config.own_vocabulary:
        rows = config.draft_vocab_size or vocab_size
        shapes["embed_tokens.weight"] = (vocab_size, config.hidden_size)
        shapes["lm_head.weight"] = (rows, config.hidden_size)
        if config.draft_vocab_size:
            shapes["d2t"] = (rows,)
    return shapes


def _assistant_shapes(config: MtpConfig, assistant: Assistant, vocab_size: int) -> Shapes:
    settings, h = assistant.settings, config.hidden_size
    width, inner = int(settings["hidden_size"]), int(settings["intermediate_size"])
    sizes = {"sliding_attention": int(settings["head_dim"])}
    sizes["full_attention"] = int(settings.get("global_head_dim") or settings["head_dim"])
    shapes: Shapes = {
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
            **shapes_of(swiglu(width, inner), f"{layer}mlp"),
            **{f"{layer}{name}.weight": (width,) for name in NORMS},
        }
    return shapes


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


EXPERTS = "layer.mlp.experts."
PROJECTIONS = "gate_proj", "up_proj", "down_proj"
FUSED = f"{EXPERTS}gate_up_proj"


def split_fused(shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Split the shapes of experts that are stored together, as if each were a separate tensor."""
    split = dict(shapes)
    if FUSED in split:
        count, both, h = split.pop(FUSED)
        split |= {f"{EXPERTS}{name}": (count, both // 2, h) for name in PROJECTIONS[:2]}
    for name in PROJECTIONS:
        count, *shape = split.pop(f"{EXPERTS}{name}", (0,))
        split |= {f"{EXPERTS}{i}.{name}.weight": tuple(shape) for i in range(count)}
    return split


def stack_experts(
    tensors: dict[str, Any], config: MtpConfig, stack: Callable[[list[Any]], Any]
) -> dict[str, Any]:
    """Return the tensors with (count, out, in) `layer.mlp.experts.{gate,up,down}_proj`."""
    if (experts := config.experts) is None:
        return tensors
    if FUSED in tensors:
        fused = tensors.pop(FUSED)
        tensors[f"{EXPERTS}gate_proj"] = fused[:, : experts.width]
        tensors[f"{EXPERTS}up_proj"] = fused[:, experts.width :]
    for name in PROJECTIONS:
        if f"{EXPERTS}{name}" not in tensors:
            names = [f"{EXPERTS}{i}.{name}.weight" for i in range(experts.count)]
            tensors[f"{EXPERTS}{name}"] = stack([tensors.pop(part) for part in names])
    return tensors
