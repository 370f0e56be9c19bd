"""Convert a drafter to another published format, for other engines.

Only what the other format can express is converted. Tensors are copied byte by byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treeflash.drafters import formats
from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.folder import read_config, read_stored, weight_files, write_stored
from treeflash.drafters.format import Format
from treeflash.drafters.formats import HEADS, TRAINING_TENSORS
from treeflash.drafters.heads.treeflash import PREFIX as TREEFLASH_PREFIX
from treeflash.drafters.loading import check_shapes, drafter_config
from treeflash.errors import ConfigError

Config = dict[str, Any]
Tensors = dict[str, dict[str, Any]]
"""By canonical name: `dtype`, `shape` and `data`, as a safetensors file holds them."""


class Conversion(NamedTuple):
    """The formats and conditional heads that can be converted to a format."""

    sources: tuple[Format, ...]
    heads: tuple[str, ...] = ()


CONVERSIONS = {
    "treeflash": Conversion(sources=(formats.DFLASH,)),
    "speculators": Conversion(
        sources=(formats.DFLASH, formats.DFLASH2, formats.DEEPSPEC, formats.SPECFORGE),
        heads=formats.family_heads("DFlash2", "DSpark"),
    ),
    "dflash": Conversion(
        sources=(formats.SPECULATORS, formats.TREEFLASH),
        heads=formats.family_heads("DFlash2", "TreeFlash"),
    ),
    "deepspec": Conversion(sources=(formats.SPECULATORS,), heads=formats.family_heads("DSpark")),
}
"""Conversions, by the name of the format to convert to."""
CONVERTED_ARCHITECTURES = {
    "dflash": "DFlashDraftModel",
    "dflash2": "DFlash2DraftModel",
    "dspark": "DSparkDraftModel",
}
"""Names of architectures, by type of speculators."""


def convert(folder: Path, output: Path, to: str, *, target: str | None = None) -> str | None:
    """Write a drafter in another format, into a folder that does not exist or is empty.

    `to` is one of `CONVERSIONS`: `treeflash` adds a head that changes nothing to a DFlash drafter;
    `speculators` takes z-lab's DFlash and DFlash2, DeepSpec's DSpark and DFlash, and SpecForge's
    DSpark, and needs the name of the `target`; `dflash` (z-lab's DFlash and DFlash2) and `deepspec`
    lead back, and `dflash` also takes a TreeFlash drafter without its AR head. The kind of AR head
    that was left out is returned; None if the converted drafter is complete. Raises a
    CheckpointError if the folder is not a drafter, or is damaged, and a ConfigError if the format
    cannot express the drafter, or `output` is not empty or cannot be written.
    """
    if to not in CONVERSIONS:
        raise ConfigError(f"unknown format {to!r}; choose one of {', '.join(CONVERSIONS)}")
    parsed, config = drafter_config(folder), read_config(folder)
    source = formats.detect_format(config)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not an empty folder")
    if source not in CONVERSIONS[to].sources:
        names = " or ".join(format_.name for format_ in CONVERSIONS[to].sources)
        fitting = [name for name, other in CONVERSIONS.items() if source in other.sources]
        advice = f"choose {' or '.join(fitting)}" if fitting else "load it as it is"
        if source is formats.TREEFLASH and to == "speculators":
            advice = "vLLM runs it with treeflash's own plugin (docs/drafters.md); or " + advice
        raise ConfigError(
            f"cannot convert a {source.name} drafter to {to}, which takes {names}; {advice}"
        )
    if to != "treeflash":
        _refuse_inexpressible(parsed, to)
    tensors = _read(folder)
    check_shapes(folder, parsed, {name: tuple(x["shape"]) for name, x in tensors.items()})
    if to == "treeflash":
        config, tensors = _add_head(config, tensors)
    elif to == "speculators":
        config = _to_speculators(config, parsed, target)
    elif to == "deepspec":
        config = _to_deepspec(config, parsed)
    elif source is formats.TREEFLASH:
        config, tensors = _drop_head(config, tensors)
    elif copies := set(tensors) & {"embed_tokens.weight", "lm_head.weight"}:
        raise ConfigError(f"dflash cannot express the drafter's own {min(copies)}")
    else:
        config = _to_dflash(config, parsed)
    formats.parse_drafter_config(config)
    text = json.dumps(config, indent=2) + "\n"
    entries = {
        name: (part["dtype"], part["shape"], len(part["data"])) for name, part in tensors.items()
    }
    written = output / "config.json", output / "model.safetensors"
    try:
        output.mkdir(parents=True, exist_ok=True)
        written[0].write_text(text, encoding="utf-8")
        write_stored(written[1], entries, (part["data"] for part in tensors.values()))
    except BaseException as error:  # an interruption, too, leaves no half of a drafter
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigError(f"{output} cannot be written: {error.strerror or error}") from error
        raise
    return parsed.head if source is formats.TREEFLASH else None


def _refuse_inexpressible(config: DrafterConfig, to: str) -> None:
    """Raise a ConfigError that names the first property that the other format lacks."""
    next_token = config.first_slot == 0
    properties: dict[str, object] = {
        "heads": config.head not in (None, *CONVERSIONS[to].heads),
        "a vocabulary of its own": config.draft_vocab_size,
        "sliding windows": any(config.sliding_windows),
        "causal full attention": any(config.causal),
        "a first token predicted by the root's slot": to == "dflash" and next_token,
        "a root's slot that predicts nothing": to == "deepspec" and not next_token,
        "the head rnn after a root's slot that predicts nothing": (
            config.head == "rnn" and not next_token
        ),
        "a factor on its embeddings": config.input_scale != 1,
        **dict(config.extensions.values()),
    }
    for name, present in properties.items():
        if present:
            raise ConfigError(f"{to} cannot express {name}, which this drafter has")


def _add_head(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Convert a DFlash drafter to a TreeFlash drafter whose linear head corrects by 0."""
    h = int(config["hidden_size"])
    dtype = next(iter(tensors.values()))["dtype"]
    prefix = f"model.{TREEFLASH_PREFIX}"
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    named[f"{prefix}d.weight"] = _stored(np.zeros((h, 2 * h)), dtype)
    named[f"{prefix}norm.weight"] = _stored(np.ones(h), dtype)
    settings = {"ar_approximation": "linear", "candidate_tokens": 16}
    converted = config | {"architectures": ["TreeFlashDraftModel"], "treeflash_config": settings}
    return converted, named


def _drop_head(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Convert a TreeFlash drafter without its head to DFlash."""
    rest = {key: value for key, value in config.items() if key != "treeflash_config"}
    backbone = {
        name: tensor for name, tensor in tensors.items() if not name.startswith(TREEFLASH_PREFIX)
    }
    return rest | {"architectures": [CONVERTED_ARCHITECTURES["dflash"]]}, backbone


def _to_speculators(config: Config, parsed: DrafterConfig, target: str | None) -> Config:
    if not target:
        raise ConfigError("speculators records the name of the target; name the target (--target)")
    drafter_keys = formats.DFLASH_KEYS | formats.MARKOV_KEYS | formats.SELECTOR_DEFAULTS.keys()
    drafter_keys = drafter_keys - {"num_target_layers"} | {"architectures", "auto_map"}
    layers = {key: value for key, value in config.items() if key not in drafter_keys}
    kind = {None: "dflash", "selector": "dflash2"}.get(parsed.head, "dspark")
    return {
        "architectures": [CONVERTED_ARCHITECTURES[kind]],
        "aux_hidden_state_layer_ids": [i + 1 for i in parsed.target_layer_ids],
        "block_size": parsed.block_size,
        "draft_vocab_size": parsed.vocab_size,
        "mask_token_id": parsed.mask_token_id,
        "sample_from_anchor": parsed.first_slot == 0,
        **_head_settings(parsed),
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": parsed.depths}],
            "verifier": {"architectures": [], "name_or_path": target},
        },
        "speculators_model_type": kind,
        "transformer_layer_config": layers,
    }


def _to_dflash(config: Mapping[str, Any], parsed: DrafterConfig) -> Config:
    kind = "dflash" if parsed.head is None else "dflash2"
    return {
        **config["transformer_layer_config"],
        "architectures": [CONVERTED_ARCHITECTURES[kind]],
        "block_size": parsed.block_size,
        "dflash_config": {
            "mask_token_id": parsed.mask_token_id,
            "target_layer_ids": list(parsed.target_layer_ids),
            **_head_settings(parsed),
        },
    }


def _to_deepspec(config: Mapping[str, Any], parsed: DrafterConfig) -> Config:
    return {
        **config["transformer_layer_config"],
        "architectures": ["Qwen3DSparkModel"],
        "block_size": parsed.block_size,
        "mask_token_id": parsed.mask_token_id,
        "target_layer_ids": list(parsed.target_layer_ids),
        **(_head_settings(parsed) or {"markov_rank": 0}),
    }


def _head_settings(parsed: DrafterConfig) -> Config:
    """Return the settings of a head, under the names that all formats give them."""
    if parsed.head is None:
        return {}
    fields = HEADS[parsed.head].settings
    return {key: getattr(parsed, field) for key, field in fields.items()}


def _read(folder: Path) -> Tensors:
    stored = [item for path in weight_files(folder) for item in read_stored(path).items()]
    return {formats.canonical_name(n): part for n, part in stored if n not in TRAINING_TENSORS}


def _stored(values: NDArray[np.float64], dtype: str) -> dict[str, Any]:
    """Return values as a tensor of a file; 0 and 1 are exact in every type."""
    if dtype == "BF16":  # the upper half of a float32
        data = (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        data = values.astype(f"<f{int(dtype[1:]) // 8}").tobytes()
    return {"dtype": dtype, "shape": list(values.shape), "data": data}
