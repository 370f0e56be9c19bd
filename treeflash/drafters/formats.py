"""Which published format a drafter's folder has, and what it says in that format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters import (
    backbone,
    deepspec,
    dflash,
    dflash2,
    domino,
    markov,
    specforge,
    speculators,
    treeflash,
)
from treeflash.drafters.folder import read_config
from treeflash.errors import CheckpointError

REFUSED = {
    "DFlashLagunaForCausalLM": "poolside's Laguna",
    "Gemma4DSparkModel": "DeepSpec's for Gemma 4",
    "K3DSparkModel": "DSpark for Kimi K3",
    "Lfm2DSparkDraftModel": "DSpark for LFM2",
    "Qwen35DSparkModel": "DSpark for Qwen3.5 layers",
}
"""Layouts of their own, by the first entry of `architectures`."""
PREFIXES = {"model.": "", "draft_model.": "", "logit_head.": markov.HEAD_PREFIX}
"""Of tensor names in some files, and what they stand for."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A published format.

    Attributes:
        name: as documentation and messages call it.
        parse: makes a `DrafterConfig` of a configuration.
        keys: that it reads, besides those of the backbone.
    """

    name: str
    parse: Callable[[Mapping[str, Any]], DrafterConfig]
    keys: frozenset[str]


DFLASH = Format(name="DFlash", parse=dflash.parse_config, keys=dflash.KEYS)
TREEFLASH = Format(
    name="TreeFlash", parse=treeflash.parse_config, keys=dflash.KEYS | treeflash.KEYS
)
DFLASH2 = Format(name="DFlash2", parse=dflash2.parse_config, keys=dflash.KEYS | dflash2.KEYS)
DEEPSPEC = Format(name="DeepSpec", parse=deepspec.parse_config, keys=dflash.KEYS | deepspec.KEYS)
SPECFORGE = Format(
    name="SpecForge DSpark", parse=specforge.parse_config, keys=dflash.KEYS | specforge.KEYS
)
DOMINO = Format(name="SpecForge Domino", parse=domino.parse_config, keys=dflash.KEYS | domino.KEYS)
SPECULATORS = Format(name="speculators", parse=speculators.parse_config, keys=speculators.KEYS)


def format_of(config: Mapping[str, Any]) -> Format:
    """The format of a configuration.

    Raises:
        ValueError: it is known and not supported, or not a drafter's.
    """
    architecture = next(iter(config.get("architectures") or ()), None)
    if "speculators_model_type" in config:
        return SPECULATORS
    if architecture in REFUSED:
        raise ValueError(f"the layout {architecture} ({REFUSED[architecture]}) is not supported")
    if any(key.startswith("dspark_") for key in config):
        raise ValueError("the layout of DeepSeek-V4's DSpark is not supported")
    projector = dflash.setting(config, "projector_type")
    if projector not in (None, "dflash", "dspark", "domino"):
        raise ValueError(f"projector_type = {projector!r} is not supported")
    if projector == "domino" or architecture == "DominoDraftModel":
        return DOMINO
    if projector == "dspark" or architecture == "DSparkDraftModel":
        return SPECFORGE
    if architecture == "Qwen3DSparkModel":
        return DEEPSPEC
    if architecture in ("DFlash2DraftModel", "Qwen3DFlash2Model") or dflash.setting(
        config, "selector_top_k"
    ):
        return DFLASH2
    if treeflash.head_name(config) or "treeflash_config" in config:
        return TREEFLASH
    return DFLASH


def drafter_config(folder: Path) -> DrafterConfig:
    """The drafter that the `config.json` of a folder describes.

    Raises:
        CheckpointError: a key is missing, has a wrong type, or asks for what is not supported.
    """
    path = folder / "config.json"
    config = read_config(folder)
    if (folder / "mask_embedding.pt").exists():
        raise CheckpointError(f"{folder} has a mask_embedding.pt, which is not supported")
    try:
        return parse_drafter_config(config)
    except KeyError as error:
        # A configuration of no other format passes for one of DFlash.
        name = format_of(config).name
        hint = f"{name} drafters need it: set it as this one was trained"
        if name in (DFLASH.name, TREEFLASH.name):
            hint = "is it a DFlash or TreeFlash drafter?"
        raise CheckpointError(f"{path} lacks {error}; {hint}") from error
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} is not valid: {error}") from error


def parse_drafter_config(config: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that a configuration describes; raises what its format's `parse` does."""
    return format_of(config).parse(config)


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of a valid configuration that were not understood and are ignored, sorted."""
    known = format_of(config).keys | backbone.KEYS | backbone.INERT_KEYS | backbone.NEUTRAL.keys()
    sections = (*dflash.SECTIONS, "transformer_layer_config")
    found = set(config) - known
    for name in sections:
        found |= {f"{name}.{key}" for key in set(config.get(name) or {}) - known}
    return sorted(found)


def with_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other settings, in its own format.

    Args:
        config: of a drafter.
        settings: any of `mask_token_id`, `target_layer_ids`, `is_causal` (of sliding layers) and
            `input_embedding_scale`, which speculators lacks.
    """
    changed = dict(config)
    if format_of(config) is not SPECULATORS:
        changed["dflash_config"] = {**(config.get("dflash_config") or {}), **settings}
        return changed
    given = dict(settings)
    if layer_ids := given.pop("target_layer_ids", None):
        given["aux_hidden_state_layer_ids"] = [i + 1 for i in layer_ids]
    if "is_causal" in given:
        given["sliding_window_non_causal"] = not given.pop("is_causal")
    return changed | given


def drafter_shapes(
    config: DrafterConfig, head_size: int = 0, *, vocab_size: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes of a drafter's tensors, by canonical name.

    Args:
        config: of the drafter.
        head_size: I, the inner width of a TreeFlash head; other heads give theirs.
        vocab_size: of the target, if the configuration does not give it.
    """
    rows = config.vocab_size or vocab_size or 0
    if config.head == "selector":
        head = dflash2.head_shapes(config.hidden_size, rows, config.head_rank)
    elif config.head in markov.HEADS:
        head = markov.head_shapes(config, rows)
    elif config.head == "domino":
        head = domino.head_shapes(config, rows)
    else:
        head = treeflash.head_shapes(config.head, config.hidden_size, head_size)
    shapes = backbone.backbone_shapes(config) | head
    if config.draft_vocab_size:
        shapes |= {
            "lm_head.weight": (config.draft_vocab_size, config.hidden_size),
            "d2t": (config.draft_vocab_size,),
        }
    return shapes


def optional_shapes(
    config: DrafterConfig, vocab_size: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors that a folder may leave out, those of the target then serving."""
    rows = config.vocab_size or vocab_size
    if not config.own_vocabulary or not rows:
        return {}
    whole = (rows, config.hidden_size)
    optional = {"embed_tokens.weight": whole, "lm_head.weight": whole}
    return {name: shape for name, shape in optional.items() if name not in drafter_shapes(config)}


def canonical_name(name: str) -> str:
    """A tensor's name, the same in every format."""
    for prefix, replacement in PREFIXES.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name
