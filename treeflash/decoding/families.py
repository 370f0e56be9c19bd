"""What is known about single model types; a type that is not in `FAMILIES` needs nothing.

transformers and mlx-lm have the models. Whether a model runs draft trees follows from its layers,
and `treeflash.decoding.probe` finds it out when the model is loaded. A record here has what neither
tells: the reason for a refusal, the form of tool calls if the tokenizer has no template for it, and
the differences between published files and mlx-lm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from treeflash.errors import UnsupportedModelError

LayerSettings = Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]]
"""Makes settings that mlx-lm reads from a configuration and the types of its layers."""


@dataclass(frozen=True, kw_only=True)
class ImageFamily:
    """How a model type, whose text after images is known to be exact, runs images.

    Attributes:
        three_axes: whether rotary positions have three axes, which follow from `image_grid_thw`.
        whole: whether the tokens of an image see each other, so that one pass must have them all.
        sliding: whether they do so in sliding layers alone, and only in targets with the setting
            `use_bidirectional_attention: vision`.
        placeholder: the attribute of its processor with what templates write for an image.
        backends: the backends that run its images.
    """

    three_axes: bool = False
    whole: bool = False
    sliding: bool = False
    placeholder: str = "image_token"
    backends: Collection[str] = ("cuda",)

    def for_config(self, text: Mapping[str, Any]) -> ImageFamily:
        """Return the record for a target with this text configuration."""
        causal = self.sliding and text.get("use_bidirectional_attention") != "vision"
        return replace(self, whole=False) if causal else self


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is known about a model type, the `model_type` of a target's configuration.

    Attributes:
        refusal: why its layers cannot run a draft tree, if they cannot.
        tool_calls: the form of its tool calls, if its tokenizer does not tell it: a name of
            `treeflash.serving.response_templates.TOOL_CALL_PARSERS`.
        mlx_type: the type under which mlx-lm has the model, if it has another name.
        mlx_weights: parts of the names of weights in published files, and mlx-lm's names for them.
        mlx_settings: settings that replace the configuration's own for mlx-lm.
        images: how it runs images, or why treeflash does not run them.
    """

    refusal: str | None = None
    tool_calls: str | None = None
    mlx_type: str | None = None
    mlx_weights: Mapping[str, str] = field(default_factory=dict)
    mlx_settings: LayerSettings | None = None
    images: ImageFamily | str = "images of this model type are not known to be exact"


def family_of(model_type: object) -> Family:
    """Return the record of a model type, which is empty if nothing is known about it."""
    return FAMILIES.get(str(model_type), Family())


def image_family(model_type: object, backend: str) -> ImageFamily | str:
    """Return how a backend runs the images of a model type; or why it does not, as a clause."""
    family = family_of(model_type).images
    if isinstance(family, ImageFamily) and backend not in family.backends:
        return f"images of this model type are not known to be exact with the {backend} backend"
    return family


def refusal(model_type: str, reason: str | None = None) -> str:
    """Say that a target cannot run a draft tree, with this reason or its family's."""
    reason = reason or family_of(model_type).refusal
    reason = reason or "their recurrent layers are of an unknown kind"
    return f"{model_type} models cannot run a draft tree: {reason}"


def _interval_settings(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Return a number in place of the types of the layers, which mlx-lm ignores."""
    full = [kind == "full_attention" for kind in kinds]
    interval = full.index(True) + 1 if any(full) else len(kinds) + 1
    if any(is_full != ((i + 1) % interval == 0) for i, is_full in enumerate(full)):
        raise UnsupportedModelError(
            f"mlx-lm supports {config['model_type']} models only with full attention in every n-th "
            "layer, but this target has it in other layers; use the cuda backend"
        )
    return {"full_attention_interval": interval}


def _granite_settings(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    # mlx-lm rotates unless this is "nope"; transformers leaves the setting out instead.
    positions = "rope" if config.get("position_embedding_type") == "rope" else "nope"
    kinds = [names.get(kind, kind) for kind in kinds]
    return {"layer_types": kinds, "position_embedding_type": positions}


def _lfm2_settings(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    return {"block_dim": config.get("block_dim", config["hidden_size"])}


_BOTH = "cuda", "mlx"
_THREE_AXES = ImageFamily(three_axes=True)
_THREE_AXES_ON_BOTH = ImageFamily(three_axes=True, backends=_BOTH)
_CROSS_ATTENTION = "its layers attend to images beside the text"

_BY_CHANNEL = Family(refusal="their recurrent layers decay each channel of the state separately")
_BY_TOKEN = Family(
    refusal="their layers depend on the last tokens (n-gram embeddings or an index of blocks)"
)
_COMPRESSED = Family(refusal="their attention layers compress the KV cache as the text grows")
_HERMES = Family(tool_calls="hermes")
_LFM2_VL = Family(
    mlx_type="lfm2-vl",
    mlx_weights={
        "model.language_model.": "language_model.model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.vision_tower.": "vision_tower.",
    },
    images=ImageFamily(backends=_BOTH),
)
_QWEN3_5 = Family(tool_calls="qwen3_coder", mlx_settings=_interval_settings, images=_THREE_AXES)
_QWEN_VL = Family(tool_calls="hermes", images=_THREE_AXES_ON_BOTH)
FAMILIES: Mapping[str, Family] = {
    "baichuan_m1": Family(refusal="their attention layers apply a short convolution to the keys"),
    "deepseek_v4": _COMPRESSED,
    "deepseek_v41": _COMPRESSED,
    "deepseek_v41_text": _COMPRESSED,
    "falcon_mamba": _BY_CHANNEL,
    "ernie4_5_vl_moe": Family(images="it chooses the experts of a token by whether it is text"),
    "evolla": Family(images=_CROSS_ATTENTION),
    "gemma3": Family(images=ImageFamily(whole=True, placeholder="boi_token", backends=_BOTH)),
    "gemma4": Family(
        tool_calls="gemma4", images=ImageFamily(whole=True, sliding=True, backends=("mlx",))
    ),
    "glm46v": Family(images=_THREE_AXES),
    "glm4v": Family(images=_THREE_AXES),
    "granitemoehybrid": Family(mlx_settings=_granite_settings),
    "hunyuan_vl": Family(images="its rotary positions have four axes"),
    "idefics": Family(images=_CROSS_ATTENTION),
    "idefics3": Family(images=ImageFamily()),
    "inkling2_loop_text": _BY_TOKEN,
    "inkling2_text": _BY_TOKEN,
    "jamba": _BY_CHANNEL,
    "lfm2": Family(mlx_settings=_lfm2_settings),
    "lfm2-vl": _LFM2_VL,
    "lfm2_vl": _LFM2_VL,
    "llava": Family(images=ImageFamily()),
    "longcat_flash_ngram": _BY_TOKEN,
    "mamba": _BY_CHANNEL,
    "minimax": Family(refusal="their lightning attention has its own kind of cache"),
    "mistral3": Family(images=ImageFamily(backends=_BOTH)),
    "mllama": Family(images=_CROSS_ATTENTION),
    "molmo2": Family(images="its images see later ones"),
    "olmo_hybrid": Family(
        mlx_weights={
            "attention_layer_norm": "input_layernorm",
            "feedforward_layer_norm": "post_attention_layernorm",
        }
    ),
    "paligemma": Family(images="its prompts see their later tokens"),
    "pixtral": Family(images=ImageFamily(backends=("mlx",))),
    "qwen2": _HERMES,
    "qwen2_5_vl": _QWEN_VL,
    "qwen2_moe": _HERMES,
    "qwen2_vl": _QWEN_VL,
    "qwen3": _HERMES,
    "qwen3_5": replace(_QWEN3_5, images=_THREE_AXES_ON_BOTH),
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_5_moe_text": replace(_QWEN3_5, mlx_type="qwen3_5_moe"),
    "qwen3_5_text": replace(_QWEN3_5, mlx_type="qwen3_5"),
    "qwen3_moe": _HERMES,
    "qwen3_next": Family(tool_calls="hermes", mlx_settings=_interval_settings),
    "qwen3_vl": _QWEN_VL,
    "qwen3_vl_moe": Family(tool_calls="hermes", images=_THREE_AXES),
    "qwen4_exp": _BY_TOKEN,
    "qwen4_exp_text": _BY_TOKEN,
    "recurrent_gemma": _BY_CHANNEL,
    "rwkv": _BY_CHANNEL,
    "rwkv7": _BY_CHANNEL,
    "smolvlm": Family(images=ImageFamily()),
    "xlstm": Family(refusal="their cells divide the state by a running maximum"),
    "zamba": _BY_CHANNEL,
    "zaya": Family(refusal="their convolutions mix channels"),
}
"""The types about which something is known, by their names."""
