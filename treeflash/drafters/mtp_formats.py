"""The published formats of heads that draft depth by depth; see `treeflash.drafters.mtp_heads`.

| family | who publishes it | how it is recognised |
| --- | --- | --- |
| Qwen MTP | Qwen3-Next, 3.5, 3.6, 3.8, in the target's folder | `mtp.fc.weight` |
| Qwen MTP | mlx-community, in a folder of its own | `model_type` `qwen3_5_mtp` |
| GLM MTP | GLM-4.5 to 4.7, DeepSeek-V3, in the target's folder | `model.layers.N.eh_proj.weight` |
| EAGLE-3 | SafeAILab, SpecForge, ModelOpt, AngelSlim | an architecture with `eagle3` in its name |
| Qwen MTP | speculators | `speculators_model_type` `mtp` |
| EAGLE-3 | DeepSpec | architecture `Qwen3Eagle3Model` or `Gemma4Eagle3Model` |
| EAGLE-3 | speculators | `speculators_model_type` `eagle3` |
| P-EAGLE | speculators | `speculators_model_type` `peagle` |
| Gemma 4's assistant | Google | `model_type` `gemma4_assistant` |
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from treeflash.drafters import backbone
from treeflash.drafters.backbone import inverse_frequencies, rope_parameters, rotary_axes
from treeflash.drafters.format import Config, Format, Names
from treeflash.drafters.mtp_heads import Assistant, Latent, MtpConfig, MtpExperts
from treeflash.drafters.mtp_tensors import required_and_optional
from treeflash.errors import UnsupportedModelError

TARGET_TENSORS = ("embed_tokens.weight", "shared_head.head.weight")
"""Copies of the target's tensors in a layer of the DeepSeek-V3 layout."""
REFUSED_TENSORS = {
    r"mtp\.fc_(hidden|embedding)\.weight": "Qwen4",
    r"mtp\.0\.": "DeepSeek-V4",
    r"model\.mtp_block\.": "mlx-vlm's GLM-4.7-Flash",
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


def _has_architecture(name: str, config: Config, stored: Collection[str]) -> bool:
    return name in (config.get("architectures") or ())


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


def text_config(config: Config) -> Config:
    """Return the settings of the language model in a `config.json`."""
    return {**config, **(config.get("text_config") or {})}


def _layer_config(config: Config, **settings: Any) -> MtpConfig:
    """Return the fields that describe one layer; `config` is the section that has its settings."""
    backbone.refuse(config, {"hidden_act": (None, "silu"), "mlp_bias": (None, False)})
    sizes, rope = backbone.layer_sizes(config), rope_parameters(config)
    rotated = int(sizes["head_dim"] * rope["partial_rotary_factor"])
    inv_freq, rope_scale = inverse_frequencies(rope, rotated)
    return MtpConfig(
        **sizes,
        vocab_size=int(config["vocab_size"]),
        inv_freq=tuple(inv_freq.tolist()),
        rope_scale=rope_scale,
        rotary_axes=rotary_axes(rope, len(inv_freq)),
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
    """Return the configuration of a head with full attention, whatever the target has."""
    text = text_config(config)
    _refuse_keys(
        text,
        lambda key: key.startswith("mtp_"),
        {"mtp_num_hidden_layers": (None, 0, 1)},
    )
    experts = None
    if f"{prefix}layers.0.mlp.gate.weight" in stored:
        experts = MtpExperts(
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
    _refuse_keys(config, lambda key: key not in known, {"num_nextn_predict_layers": (None, 1)})
    return _parse_qwen(config["transformer_layer_config"], stored, target_layers, prefix="mtp_")


def _speculators_mtp_names(config: Config, stored: Collection[str]) -> Names:
    renamed = {
        "token_layernorm": "embedding_norm",
        "hidden_layernorm": "hidden_norm",
        "input_proj": "input_proj",
        "final_layernorm": "norm",
    }
    return {x: _renamed(x.removeprefix("mtp_layers.0."), renamed, "layer.") for x in stored}


def _renamed(part: str, modules: Mapping[str, str], prefix: str = "") -> str:
    """Return a weight's name with its module renamed; other names get the prefix."""
    module = part.removesuffix(".weight")
    return f"{modules[module]}.weight" if module in modules else prefix + part


def _parse_glm(config: Config, stored: Collection[str], target_layers: int) -> MtpConfig:
    """GLM-4.5 to 4.7 and DeepSeek-V3: a layer like the target's mixtures, behind its last one."""
    _refuse_keys(
        config,
        lambda key: "nextn" in key or "mtp" in key,
        {"num_nextn_predict_layers": (None, 0, 1), "num_mtp_modules": (None, 0, 1)},
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
        experts=MtpExperts(
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
            canonical = _renamed(part, renamed, "layer.")
            canonical = canonical.replace("shared_experts.", "shared_expert.")
            canonical = canonical.replace("e_score_correction_bias", "correction.bias")
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
EAGLE_INERT = {
    "decoder_sparse_step",  # describes the target's experts, as `router_aux_loss_coef` does
    "image_token_id",
    "modal_type",
    "parallel_draft_heads_num_layers",  # for a `parallel_draft_step` above 1
    "router_aux_loss_coef",
    "target_model_type",
    "video_token_id",
    "vision_end_token_id",
    "vision_start_token_id",
    "vision_token_id",
}
"""Keys of published files that mean nothing for an EAGLE-3 head."""
PEAGLE_KEYS = {
    "mask_token_id",
    "down_sample_ratio",  # describes the training, as the two keys below do
    "down_sample_ratio_min",
    "num_depths",
}
"""The keys that P-EAGLE has beside EAGLE-3's."""
EAGLE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "draft_num_hidden_layers": (None, 1),
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
    "step_loss_decay",  # describes the training, as `ttt_length` does
    "target_layer_ids",
    "target_model_name_or_path",
    "ttt_length",
}
GEMMA4_EAGLE_INERT = {
    "final_logit_softcapping",  # read beside the other settings
    "moe_intermediate_size",
    "target_text_model_type",
    "use_bidirectional_attention",  # lets the tokens of a picture see each other
    "use_double_wide_mlp",  # describes layers that share keys, which are refused
    "vocab_size_per_layer_input",
}
"""Keys of a Gemma 4 target's settings that mean nothing for its EAGLE-3 head."""
SPECULATORS_INERT = {
    "speculators_config",
    "speculators_model_type",
    "speculators_version",
    "transformer_layer_config",
}


def _parse_eagle(config: Config, stored: Collection[str], target_layers: int) -> MtpConfig:
    """SafeAILab, SpecForge and ModelOpt: the settings of a Llama with one layer."""
    nested = config.get("eagle_config") or {}
    for section in (config, nested):
        _refuse_unknown(section, EAGLE_KEYS | backbone.KEYS)
    ids = config.get("eagle_aux_hidden_state_layer_ids")
    if ids is not None:
        ids = [int(i) - 1 for i in ids]
    elif (ids := nested.get("eagle_aux_hidden_state_layer_ids")) is not None:
        ids = [int(i) for i in ids]  # the ids of the layers whose outputs are read
    # Either place may have a setting; the section counts first, as in vLLM.
    config = {**config, **{key: value for key, value in nested.items() if value is not None}}
    return _eagle_config(config, config, ids or _default_layers(target_layers), stored)


def _parse_deepspec_eagle(config: Config, stored: Collection[str], target_layers: int) -> MtpConfig:
    """DeepSpec: a copy of the target's settings, and the ids of layers whose outputs are read."""
    _refuse_unknown(config, DEEPSPEC_EAGLE_KEYS | backbone.KEYS)
    return _eagle_config(config, config, [int(i) for i in config["target_layer_ids"]], stored)


def _parse_gemma4_eagle(config: Config, stored: Collection[str], target_layers: int) -> MtpConfig:
    """DeepSpec for Gemma 4: a layer like Gemma 4's layers of full attention."""
    settings, fields = backbone.gemma4_layers(config)
    unread = backbone.GEMMA4_KEYS | GEMMA4_EAGLE_INERT
    rest = {key: value for key, value in config.items() if key not in unread}
    parsed = _parse_deepspec_eagle({**rest, **settings}, stored, target_layers)
    softcap = float(config.get("final_logit_softcapping") or 0) or None
    return replace(parsed, qk_norm=True, softcap=softcap, **fields)


def _parse_speculators(config: Config, stored: Collection[str], target_layers: int) -> MtpConfig:
    layers = backbone.speculators_layers(config)
    _refuse_unknown(config, EAGLE_KEYS | SPECULATORS_INERT)
    ids = [int(i) - 1 for i in config.get("eagle_aux_hidden_state_layer_ids") or ()]
    return _eagle_config(config, layers, ids or _default_layers(target_layers), stored)


def _parse_peagle(config: Config, stored: Collection[str], target_layers: int) -> MtpConfig:
    """P-EAGLE: EAGLE-3's rows, and behind them a row with the mask token for each deeper depth."""
    eagle = {key: value for key, value in config.items() if key not in PEAGLE_KEYS}
    layers = dict(config["transformer_layer_config"])
    count = int(layers["num_hidden_layers"])
    if any(backbone.sliding_layers(layers, count)):
        raise ValueError("P-EAGLE with a sliding window is not supported")
    layers |= {"num_hidden_layers": 1, "layer_types": None}
    methods = config["speculators_config"]["proposal_methods"]
    if not methods:
        raise ValueError("speculators_config has no proposal_methods, which tell the depths")
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
        sliding_windows=(backbone.window_size(layers["sliding_window"]) if sliding else None,),
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
            names[name] = _renamed(part, renamed)
    return names


def _refuse_unknown(config: Config, known: Collection[str]) -> None:
    """Raise a ValueError for the first setting of an EAGLE-3 head that nothing reads."""
    understood = {*known, *EAGLE_INERT, *backbone.INERT_KEYS}
    _refuse_keys(config, lambda key: key not in understood, EAGLE_NEUTRAL)


def _refuse_keys(
    config: Config, selected: Callable[[str], bool], known: Mapping[str, Collection[Any]]
) -> None:
    """Raise a ValueError for the first selected setting with a value that is not known.

    None and False are known of the settings that are not in `known`.
    """
    for key, value in config.items():
        if selected(key) and value not in known.get(key, (None, False)):
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
    "attention_k_eq_v",  # describes the target's keys, as the two keys below do
    "num_global_key_value_heads",
    "num_key_value_heads",
    "final_logit_softcapping",  # the published code bounds no logits
    "global_head_dim",
    "num_kv_shared_layers",
    "sliding_window",
    "use_bidirectional_attention",  # concerns prompts; a draft sees committed positions alone
}
ASSISTANT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "hidden_act": (None,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_size_per_layer_input": (None, 0),
    "vocab_size_per_layer_input": (None, 0),
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
        **backbone.layer_sizes(settings) | {"hidden_size": int(config["backbone_hidden_size"])},
        intermediate_size=int(settings["intermediate_size"]),
        num_hidden_layers=0,
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
    embeddings = "model.embed_tokens.weight"  # embeds the drafted tokens: the output head, tied
    return {**names, embeddings: "lm_head.weight"} if embeddings in names else names


_mtp = partial(Format, kind="rows", shapes=required_and_optional)
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
    detect=partial(_has_architecture, "Qwen3Eagle3Model"),
    parse=_parse_deepspec_eagle,
    names=_eagle_names,
)
GEMMA4_EAGLE3 = _mtp(
    name="EAGLE-3",
    detect=partial(_has_architecture, "Gemma4Eagle3Model"),
    parse=_parse_gemma4_eagle,
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
    GEMMA4_EAGLE3,
    EAGLE3,
    QWEN_SIDECAR,
    ASSISTANT,
    QWEN_MTP,
    GLM_MTP,
)
"""All formats, in the order in which they are tried."""
