"""The published formats of block drafters, and the registry of their conditional heads.

| format | who publishes it | how `detect_format` recognises it |
| --- | --- | --- |
| DFlash (arXiv 2602.06036) | z-lab, JetSpec, NVIDIA | default: nothing of the below |
| TreeFlash (arXiv 2606.03819) | TreeFlash | `ar_approximation` names a head |
| DFlash2 | z-lab, incoai | `DFlash2DraftModel`, or `selector_top_k` |
| DeepSpec | deepseek-ai, LiquidAI | `{Qwen3,Qwen35}DSparkModel`, `Lfm2DSparkDraftModel` |
| DeepSpec for Gemma 4 | deepseek-ai | `Gemma4DSparkModel` |
| Muse Glimmer's assistant | Meta | `MuseGlimmerAssistantModel` |
| SpecForge DSpark, SpecForge Domino | sgl-project | `projector_type` `dspark` or `domino` |
| speculators | vllm-project, RedHatAI, poolside | `speculators_model_type` |

All of them have the backbone of `treeflash.drafters.backbone`. A drafter's own settings are in the
section `dflash_config` of its `config.json`, in `treeflash_config`, or at the top level. Settings
of speculators are at the top level, and the layers' settings in `transformer_layer_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from treeflash.drafters import backbone
from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.format import (
    Config,
    Format,
    HeadFormat,
    Names,
    Shapes,
    as_outline,
    shapes_of,
)
from treeflash.drafters.heads import domino, markov, selector, treeflash
from treeflash.drafters.heads.treeflash import PREFIX as TREEFLASH_PREFIX
from treeflash.drafters.layers import BlockModel

HEADS: dict[str, HeadFormat] = {
    **treeflash.HEADS,
    **markov.HEADS,
    **selector.HEADS,
    **domino.HEADS,
}
"""Conditional heads, by `DrafterConfig.head`."""


def family_heads(*families: str) -> tuple[str, ...]:
    """Return the names of all heads of some families."""
    return tuple(name for name, head in HEADS.items() if head.family in families)


TREEFLASH_HEADS = family_heads("TreeFlash")
MARKOV_HEADS = family_heads("DSpark")
SELECTOR_DEFAULTS = {
    "conv_kernel_size": 2,
    "conv_group_size": 16,
    "selector_rank": 256,
    "selector_top_k": 16,
}
"""The settings of DFlash2, with the values of the published drafters."""
SECTIONS = ("dflash_config", "treeflash_config")
"""Where a `config.json` may hold a drafter's own settings; the top level is searched last."""
REFUSED = {
    "DFlashLagunaForCausalLM": "poolside's Laguna",
    "K3DSparkModel": "DSpark for Kimi K3",
    "LiLiCorrDraftModel": "LiLiCorr",
    "PEagleDraftModel": "P-EAGLE of SpecForge",
}
"""Layouts that are not supported, by the first entry of `architectures`."""
OTHER_FORMATS: dict[str, tuple[Any, ...]] = {
    "markov_rank": (None, 0),
    "selector_top_k": (None,),
    "projector_type": (None, "dflash"),
}
"""Keys that make a drafter another one than DFlash, with the values that mean nothing."""


DRAFTER_SETTINGS = {"speculators_model_type", "dflash_config", "target_layer_ids", "eagle_config"}
"""Settings that only drafters have: each has at least one of them."""
ATTENTION_KEYS = ("add_swa_attention_sink_bias", "attention_sink_bias", "use_swa")
"""Settings of attention sinks and windows, which all formats but speculators may have."""
TRAINING_TENSORS = frozenset({"t2d", "verifier_lm_head.weight", "verifier_norm.weight"})
"""Tensors that only training needs, in folders of speculators."""


def parse_drafter_config(config: Config) -> DrafterConfig:
    """Parse the configuration of a block drafter; raises what its `Format.parse` does."""
    parsed = detect_format(config).parse(config, (), 0)  # a block drafter ignores both
    assert isinstance(parsed, DrafterConfig)
    return parsed


def detect_format(config: Config) -> Format:
    """Tell the format of a block drafter; a ValueError if the format is not supported."""
    if not SPECULATORS.detect(config, ()):
        _refuse_layouts(config)
    return next(format_ for format_ in BLOCK_FORMATS if format_.detect(config, ()))


def _refuse_layouts(config: Config) -> None:
    """Raise a ValueError for a layout that is known and not supported."""
    architecture = _architecture(config)
    if architecture in REFUSED:
        raise ValueError(f"the layout {architecture} ({REFUSED[architecture]}) is not supported")
    deepspec = any(format_.detect(config, ()) for format_ in (DEEPSPEC, GEMMA4))
    if not deepspec and any(key.startswith("dspark_") for key in config):
        raise ValueError("the layout of DeepSeek-V4's DSpark is not supported")
    projector = find_setting(config, "projector_type")
    if projector not in (None, "dflash", "dspark", "domino"):
        raise ValueError(f"projector_type = {projector!r} is not supported")


def _architecture(config: Config) -> Any:
    return next(iter(config.get("architectures") or ()), None)


def _published_as(*architectures: str, projector: str | None = None) -> Callable[[Config], bool]:
    """Return a function that tells whether a configuration has one of these names."""

    def detect(config: Config) -> bool:
        named = projector is not None and find_setting(config, "projector_type") == projector
        return named or _architecture(config) in architectures

    return detect


def find_setting(config: Config, *names: str, default: Any = None) -> Any:
    """Find a drafter's own setting, from whichever section of its `config.json` holds it.

    Formats use different keys for a setting; the first of `names` that has a value counts.
    """
    sections = (*_sections(config).values(), config)
    for name in names:
        value = next((section[name] for section in sections if name in section), None)
        if value is not None:
            return value
    return default


def unknown_keys(config: Config) -> list[str]:
    """Return the keys of a valid configuration that were not understood and are ignored, sorted."""
    known = detect_format(config).keys
    known |= backbone.KEYS | backbone.INERT_KEYS | backbone.NEUTRAL.keys() | {"swa_window_size"}
    sections = {name: config.get(name) or {} for name in (*SECTIONS, "transformer_layer_config")}
    unknown = set(config) - known - sections.keys()
    for name, section in sections.items():
        unknown |= {f"{name}.{key}" for key in set(section) - known}
    return sorted(unknown)


def replace_settings(config: Config, settings: Config) -> dict[str, Any]:
    """Return a configuration with other settings, in its own format.

    The settings are any of `mask_token_id`, `target_layer_ids`, `is_causal` (of sliding layers) and
    `input_embedding_scale`, which speculators lacks.
    """
    changed = dict(config)
    if detect_format(config) is not SPECULATORS:
        changed["dflash_config"] = {**(config.get("dflash_config") or {}), **settings}
        return changed
    renamed = dict(settings)
    if layer_ids := renamed.pop("target_layer_ids", None):
        renamed["aux_hidden_state_layer_ids"] = [i + 1 for i in layer_ids]
    if "is_causal" in renamed:
        renamed["sliding_window_non_causal"] = not renamed.pop("is_causal")
    return changed | renamed


def drafter_shapes(
    config: DrafterConfig, head_size: int = 0, *, vocab_size: int | None = None
) -> Shapes:
    """Return the shapes of a drafter's tensors as they are stored, by canonical name.

    `head_size` is I, the inner width of a TreeFlash head; `vocab_size` is the target's, if the
    configuration does not give it.
    """
    others: Shapes = {}
    if config.draft_vocab_size:
        others["lm_head.weight"] = config.draft_vocab_size, config.hidden_size
        others["d2t"] = (config.draft_vocab_size,)
    if config.head is not None:
        rows = config.vocab_size or vocab_size or 0
        others |= HEADS[config.head].shapes(config, rows, head_size)
    shapes = shapes_of(as_outline(BlockModel)(config))
    # The gates of queries are rows of `q_proj`, which `arrange_block` splits.
    for name in [name for name in shapes if ".self_attn.gate_proj." in name]:
        rows, *columns = shapes.pop(name)
        shapes[name.replace("gate_proj", "q_proj")] = (2 * rows, *columns)
    return shapes | others


def head_inner_size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """I, the inner width of the TreeFlash head among tensors of these shapes; 0 without one."""
    # Either tensor gives the width, so that the other can be reported as missing by name.
    down = shapes.get(TREEFLASH_PREFIX + "d.weight")
    bias = shapes.get(TREEFLASH_PREFIX + "ug.bias")
    return down[-1] if down else bias[0] // 2 if bias else 0


CANONICAL_PREFIXES = {
    "model.": "",
    "draft_model.": "",
    "logit_head.": "markov_head.",
    "encoder.fc.": "fc.",
    "encoder.output_norm_enc.": "hidden_norm.",
    # NVIDIA's exports of DSpark have no module for the head.
    "markov_w1.": "markov_head.markov_w1.",
    "markov_w2.": "markov_head.markov_w2.",
    "gate_proj.": "markov_head.gate_proj.",
    "joint_proj.": "markov_head.joint_proj.",
    "confidence_proj.": "confidence_head.proj.",
    # mlx-vlm has modules for DFlash2's parameters.
    "candidate_selector.predecessor_codebook.weight": "candidate_selector.predecessor_codebook",
    "candidate_selector.successor_codebook.weight": "candidate_selector.successor_codebook",
}
"""What some files have at the beginning of a tensor's name, and what all others have there."""


def canonical_name(name: str) -> str:
    """Return a tensor's name as most files have it."""
    for prefix, replacement in CANONICAL_PREFIXES.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def _sections(config: Config) -> dict[str, dict[str, Any]]:
    return {name: dict(config.get(name) or {}) for name in SECTIONS}


def _refuse_unread(
    section: Config, keys: Iterable[str], layers: Config, place: str, prefix: str = ""
) -> None:
    """Raise a ValueError for a setting in a drafter's section that nothing would read.

    Such a setting may change the drafts without an error: the target verifies them, and they are
    merely accepted less often. At the top level unknown keys are ignored, since many drafters'
    files are copies of their target's. The settings of the `layers` are read at another `place`;
    `prefix` is the section's name in messages.
    """
    for key, value in section.items():
        if value in (None, False) or key in (*keys, *backbone.INERT_KEYS, *backbone.NEUTRAL):
            continue
        if key == "swa_window_size" and section.get("use_swa"):
            continue  # it takes the place of the layers' window
        top_key = "sliding_window" if key == "swa_window_size" else key
        if top_key not in backbone.KEYS:
            raise ValueError(
                f"{prefix}{key} = {value!r} is not supported; "
                "remove it if it does not change the drafter's output"
            )
        if value != layers.get(top_key):
            raise ValueError(
                f"{prefix}{key} = {value!r} contradicts {top_key} = {layers.get(top_key)!r} {place}"
            )


def _parse_dflash(config: Config) -> DrafterConfig:
    """DFlash and TreeFlash: slot k of a block predicts token k."""
    for section in (config, *_sections(config).values()):
        backbone.refuse(section, OTHER_FORMATS)
    head = find_setting(config, "ar_approximation")
    if head not in (None, *TREEFLASH_HEADS):
        names = ", ".join(TREEFLASH_HEADS)
        raise ValueError(f"unknown AR head {head!r}; known heads are {names}")
    return _parse_sections(config, head=head)


def _parse_muse(config: Config) -> DrafterConfig:
    """Muse Glimmer's assistant: DFlash whose sliding layers see both ways.

    A slot sees the positions at a distance of `sliding_window` too.
    """
    layer_types = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
    width = backbone.window_size(config["sliding_window"]) + 1
    window = {"layer_types": layer_types, "sliding_window": width}
    own = {"causal": False, **(config.get("dflash_config") or {})}
    return _parse_sections({**config, **window, "dflash_config": own})


def _parse_sections(config: Config, **settings: Any) -> DrafterConfig:
    """Parse the keys that all formats but speculators share; `settings` are the head's.

    With `use_swa` all layers have a window, unless `layer_types` names some sliding ones.
    """
    for section in _sections(config).values():
        backbone.refuse(_without(section, ATTENTION_KEYS))
    layer_ids = find_setting(config, "target_layer_ids")
    target_layers = find_setting(config, "num_target_layers")  # LiquidAI has it in the section
    if layer_ids is None:
        if target_layers is None:
            raise KeyError("num_target_layers")
        layer_ids = backbone.default_target_layer_ids(
            int(target_layers), int(config["num_hidden_layers"])
        )
    backbone.refuse_adapter(find_setting(config, "target_hidden_size"), config)
    # The published code makes sliding layers causal unless the checkpoint says otherwise.
    causal = find_setting(config, "is_causal", "causal", "causal_head")
    softcap = find_setting(config, "final_logit_softcapping")
    sinks = find_setting(config, "attention_sink_bias", "add_swa_attention_sink_bias")
    parsed = backbone.backbone_config(
        _without(config, ATTENTION_KEYS),
        block_size=int(find_setting(config, "block_size", default=16)),
        mask_token_id=find_setting(config, "mask_token_id"),
        causal=None if causal is None else bool(causal),
        target_layer_ids=tuple(int(i) for i in layer_ids),
        num_target_layers=None if target_layers is None else int(target_layers),
        input_scale=float(find_setting(config, "input_embedding_scale", default=1.0)),
        output_multiplier=float(find_setting(config, "output_multiplier", default=1.0)),
        softcap=float(softcap) if softcap and softcap > 0 else None,
        attention_sinks=bool(sinks),
        **settings,
    )
    if not find_setting(config, "use_swa"):
        return parsed
    window = find_setting(config, "swa_window_size", "sliding_window")
    if window is None:
        raise KeyError("swa_window_size")
    slides = [width is not None for width in parsed.sliding_windows]
    width = backbone.window_size(window)
    windows = tuple(width if each or not any(slides) else None for each in slides)
    return replace(parsed, sliding_windows=windows)


def _without(settings: Config, keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def _parse_dflash2(config: Config) -> DrafterConfig:
    """DFlash with convolutions along a block, and a selector of candidates."""
    settings = {key: find_setting(config, key) for key in SELECTOR_DEFAULTS}
    return _parse_sections(config, **_selector_fields(settings, config))


def _selector_fields(settings: Config, layers: Config) -> dict[str, Any]:
    """Parse a selector's fields of `DrafterConfig`, from its and the layers' settings."""
    values = {
        key: int(default if settings.get(key) is None else settings[key])
        for key, default in SELECTOR_DEFAULTS.items()
    }
    if any(value < 1 for value in values.values()):
        raise ValueError(f"the settings of DFlash2 must be 1 or more, got {values}")
    if int(layers["hidden_size"]) % values["conv_group_size"]:
        raise ValueError(
            f"hidden_size {layers['hidden_size']} is not a multiple of "
            f"conv_group_size {values['conv_group_size']}"
        )
    fields = HEADS["selector"].settings
    return {"head": "selector", **{fields[key]: value for key, value in values.items()}}


def _parse_deepspec(config: Config) -> DrafterConfig:
    """DSpark, and the DFlash of DeepSeek, which is DSpark without heads.

    Slot k of a block predicts token k + 1, so that the root's slot counts. The rest of the
    configuration is a copy of the target's.
    """
    draft_vocab_size = config.get("draft_vocab_size")
    if draft_vocab_size not in (None, config.get("vocab_size")):
        raise ValueError(f"draft_vocab_size = {draft_vocab_size!r} is not supported")
    if "target_layer_ids" not in config and "dflash_config" not in config:
        raise KeyError("target_layer_ids")
    head = _markov_fields({key: find_setting(config, key) for key in MARKOV_KEYS})
    bonus = bool(find_setting(config, "dspark_bonus_anchor"))  # NVIDIA's key, with the other sense
    samples = bool(find_setting(config, "sample_from_anchor", default=not bonus))
    if samples and bonus:
        raise ValueError("sample_from_anchor and dspark_bonus_anchor exclude each other")
    first_slot = 0 if samples else 1
    parsed = _parse_sections(config, first_slot=first_slot, own_vocabulary=True, **head)
    if "Qwen35DSparkModel" not in (config.get("architectures") or ()):
        return parsed  # the same key of a copy of the target's configuration means nothing
    return _gated(parsed, config) if config.get("enable_qwen35_gated_q_proj") else parsed


def _gated(parsed: DrafterConfig, config: Config) -> DrafterConfig:
    """Return a drafter whose layers are Qwen3.5's: gates, norms of 1 + w, and partial rotary."""
    rope = backbone.rope_parameters(config)
    channels = int(parsed.head_dim * rope["partial_rotary_factor"])
    rotated, scale = backbone.inverse_frequencies(rope, channels)
    if scale != 1:
        raise ValueError(f"rope type {rope['rope_type']!r} is not supported with gated queries")
    still = (0.0,) * (parsed.head_dim // 2 - len(rotated))
    inv_freq = (*rotated.tolist(), *still)
    return replace(parsed, gated=True, norm_offset=1.0, inv_freq=inv_freq)


def _parse_gemma4(config: Config) -> DrafterConfig:
    """DeepSpec's drafters with layers like Gemma 4's layers of full attention."""
    settings, fields = backbone.gemma4_layers(config)
    return replace(_parse_deepspec({**config, **settings}), **fields)


def _parse_specforge(config: Config) -> DrafterConfig:
    """DSpark's heads on a DFlash backbone.

    SpecForge trains them on the tokens after the root, as DeepSpec does, although its own
    `spec_generate` reads the slots one later. NVIDIA's exports say so in `shift_label`.
    """
    settings = {key: find_setting(config, key) for key in MARKOV_KEYS}
    confidence = find_setting(config, "enable_confidence_head", "use_confidence_head")
    head = _markov_fields({**settings, "enable_confidence_head": confidence})
    first_slot = 0 if find_setting(config, "shift_label", default=True) else 1
    return _parse_sections(config, first_slot=first_slot, own_vocabulary=True, **head)


def _markov_fields(settings: Config) -> dict[str, Any]:
    """Parse the fields of a Markov head, a bias on logits by earlier tokens."""
    rank = int(settings.get("markov_rank") or 0)
    confidence = bool(settings.get("enable_confidence_head"))
    if not rank:
        if confidence:
            raise ValueError("a confidence head without a Markov head is not supported")
        return {"head": None}
    head = settings.get("markov_head_type") or "vanilla"
    if head not in MARKOV_HEADS:
        names = ", ".join(MARKOV_HEADS)
        raise ValueError(f"Markov head {head!r} is not supported; supported are {names}")
    return {
        "head": head,
        "head_rank": rank,
        "head_state_size": rank if head == "rnn" else 0,
        "confidence_head": confidence,
        "confidence_with_markov": settings.get("confidence_head_with_markov") is not False,
    }


def _parse_domino(config: Config) -> DrafterConfig:
    """Parse a correction of the logits by a GRU over the tokens of a block so far."""
    sizes = {key: find_setting(config, key) for key in HEADS["domino"].settings}
    for key, size in sizes.items():
        if size is None:
            raise KeyError(key)
        if int(size) < 1:
            raise ValueError(f"{key} must be 1 or more, got {size}")
    return _parse_sections(
        config,
        first_slot=0 if find_setting(config, "shift_label") else 1,
        head="domino",
        head_rank=int(sizes["emb_dim"]),
        head_state_size=int(sizes["gru_hidden_dim"]),
        head_from_depth=1 + int(find_setting(config, "pure_draft_prefix_len", default=0)),
    )


def _parse_speculators(config: Config) -> DrafterConfig:
    """DFlash, DFlash2 and DSpark in a nested configuration.

    Its layer ids index the hidden states of transformers, which begin with the embeddings. It
    may have a smaller vocabulary of its own.
    """
    kind = config["speculators_model_type"]
    if kind not in ("dflash", "dflash2", "dspark"):
        known = "dflash, dflash2, dspark"
        raise ValueError(f"speculators of type {kind!r} are not supported; supported are {known}")
    backbone.refuse(config)
    layers = backbone.speculators_layers(config)
    # vLLM reads these at the top level first.
    layers |= {key: config[key] for key in ("layer_types", "sliding_window") if config.get(key)}
    # The top level is no copy of a target's.
    _refuse_unread(config, SPECULATORS.keys, layers, "in transformer_layer_config")
    backbone.refuse_adapter(config.get("target_hidden_size"), layers)
    for key in ("mask_token_id", "aux_hidden_state_layer_ids"):
        if config.get(key) is None:
            raise KeyError(key)
    block_size = int(config.get("block_size", 8))
    head = _selector_fields(config, layers) if kind == "dflash2" else {}
    if kind == "dspark":
        settings = {key: config[key] for key in MARKOV_KEYS if config.get(key) is not None}
        head = _markov_fields({"markov_rank": 256, "enable_confidence_head": True, **settings})
    first_slot = 0 if _samples_from_anchor(config, kind, block_size) else 1
    if first_slot and head.get("head") == "rnn":
        # The training steps the recurrence over the root's slot first, which it does not predict.
        raise ValueError("markov_head_type 'rnn' needs sample_from_anchor, which is false")
    non_causal = config.get("sliding_window_non_causal")
    if non_causal is None:
        non_causal = kind == "dflash2"
    draft_vocab_size = backbone.draft_vocab_size(config, layers)
    if draft_vocab_size and kind == "dflash2":
        raise ValueError("DFlash2 with a vocabulary of its own is not supported")
    return backbone.backbone_config(
        layers,
        block_size=block_size,
        mask_token_id=config["mask_token_id"],
        causal=False if non_causal else None,
        target_layer_ids=tuple(int(i) - 1 for i in config["aux_hidden_state_layer_ids"]),
        num_target_layers=None,
        first_slot=first_slot,
        window_from_root=True,
        own_vocabulary=True,
        draft_vocab_size=draft_vocab_size,
        **head,
    )


def _samples_from_anchor(config: Config, kind: str, block_size: int) -> bool:
    """Return whether the root's slot predicts the first token."""
    section = config.get("speculators_config") or {}
    methods = section.get("proposal_methods") or [{}]
    width = methods[0].get("speculative_tokens")
    samples = config.get("sample_from_anchor")
    if samples is None:
        # Older files lack the key and were trained either way; the width of proposals tells.
        return kind == "dspark" and width == block_size
    if samples is False and width is not None and int(width) >= block_size and kind != "dflash":
        raise ValueError(
            f"sample_from_anchor is false, but speculative_tokens {width} needs the anchor's slot "
            f"of block_size {block_size}"
        )
    return bool(samples)


DFLASH_KEYS = frozenset(
    (  # noqa: SIM905
        "ar_approximation block_size candidate_tokens causal causal_head dflash_config "
        "final_logit_softcapping input_embedding_scale is_causal mask_token_id "
        "num_target_layers output_multiplier projector_type target_hidden_size "
        "target_layer_ids treeflash_config"
    ).split()
) | frozenset(ATTENTION_KEYS)
SPECULATORS_KEYS = frozenset(
    (  # noqa: SIM905
        "aux_hidden_state_layer_ids block_size draft_vocab_size mask_token_id "
        "sample_from_anchor sliding_window_non_causal speculators_config "
        "speculators_model_type speculators_version target_hidden_size "
        "transformer_layer_config"
    ).split()
)
MARKOV_KEYS = frozenset(
    {*HEADS["vanilla"].settings, "confidence_head_alpha", "confidence_temperatures"}
)


def _block(
    name: str,
    parse: Callable[[Config], DrafterConfig],
    keys: Iterable[str],
    detect: Callable[[Config], bool],
) -> Format:
    """Make the entry of a block drafter's format.

    In its own sections a setting that nothing reads is refused.
    """
    known = frozenset(keys)

    def parse_known(config: Config, stored: Collection[str], layers: int) -> DrafterConfig:
        if "speculators_model_type" not in config:  # it has no such sections
            for section_name, section in _sections(config).items():
                _refuse_unread(section, known, config, "at the top level", f"{section_name}.")
        return parse(config)

    return Format(
        name=name,
        kind="block",
        detect=lambda config, stored: detect(config),
        parse=parse_known,
        names=_names,
        shapes=block_shapes,
        keys=known,
    )


def _names(config: Config, stored: Collection[str]) -> Names:
    names = {name: canonical_name(name) for name in stored}
    return {stored: name for stored, name in names.items() if name not in TRAINING_TENSORS}


def block_shapes(
    config: DrafterConfig, vocab_size: int | None, stored: Shapes
) -> tuple[Shapes, Shapes]:
    """Return the shapes of the tensors that a folder must have, and of optional ones.

    It may leave out what the target has, too. `vocab_size` is the target's, if the configuration
    does not give it.
    """
    optional: Shapes = {}
    if config.own_vocabulary and (rows := config.vocab_size or vocab_size):
        optional["embed_tokens.weight"] = rows, config.hidden_size
        if not config.draft_vocab_size:
            optional["lm_head.weight"] = rows, config.hidden_size
    return drafter_shapes(config, head_inner_size(stored), vocab_size=vocab_size), optional


DFLASH = _block("DFlash", _parse_dflash, DFLASH_KEYS, lambda config: True)
TREEFLASH = _block(
    "TreeFlash",
    _parse_dflash,
    DFLASH_KEYS,
    lambda config: find_setting(config, "ar_approximation") is not None,
)
DFLASH2 = _block(
    "DFlash2",
    _parse_dflash2,
    DFLASH_KEYS | SELECTOR_DEFAULTS.keys(),
    lambda config: (
        _published_as("DFlash2DraftModel", "Qwen3DFlash2Model")(config)
        or bool(find_setting(config, "selector_top_k"))
    ),
)
MUSE = _block(
    "Muse Glimmer's assistant",
    _parse_muse,
    DFLASH_KEYS,
    _published_as("MuseGlimmerAssistantModel"),
)
DEEPSPEC_KEYS = {
    *DFLASH_KEYS,
    *MARKOV_KEYS,
    "draft_vocab_size",
    "dspark_bonus_anchor",
    "eagle_aux_hidden_state_layer_ids",  # beside `target_layer_ids`, of other engines
    "sample_from_anchor",
}
DEEPSPEC = _block(
    "DeepSpec",
    _parse_deepspec,
    DEEPSPEC_KEYS | {"enable_qwen35_gated_q_proj"},
    _published_as("Qwen3DSparkModel", "Lfm2DSparkDraftModel", "Qwen35DSparkModel"),
)
GEMMA4 = _block(
    "DeepSpec for Gemma 4",
    _parse_gemma4,
    DEEPSPEC_KEYS | backbone.GEMMA4_KEYS,
    _published_as("Gemma4DSparkModel"),
)
SPECFORGE = _block(
    "SpecForge DSpark",
    _parse_specforge,
    DFLASH_KEYS | MARKOV_KEYS | {"shift_label", "use_confidence_head"},
    _published_as("DSparkDraftModel", projector="dspark"),
)
DOMINO = _block(
    "SpecForge Domino",
    _parse_domino,
    DFLASH_KEYS | {*HEADS["domino"].settings, "pure_draft_prefix_len", "shift_label"},
    _published_as("DominoDraftModel", projector="domino"),
)
SPECULATORS = _block(
    "speculators",
    _parse_speculators,
    MARKOV_KEYS | SELECTOR_DEFAULTS.keys() | SPECULATORS_KEYS,
    lambda config: "speculators_model_type" in config,
)
BLOCK_FORMATS = (
    SPECULATORS,
    DOMINO,
    SPECFORGE,
    DEEPSPEC,
    GEMMA4,
    MUSE,
    DFLASH2,
    TREEFLASH,
    DFLASH,
)
"""All formats, in the order in which they are tried: what is no other one passes for DFlash."""
