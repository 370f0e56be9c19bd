"""Drafters in another format, for other engines: the same weights, another configuration.

Only what the other format can express is converted. Tensors are copied byte by byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters import dflash2, markov
from treeflash.drafters.folder import check_dtype, read_config, stored_shapes, weight_files
from treeflash.drafters.formats import (
    DEEPSPEC,
    DFLASH,
    DFLASH2,
    SPECFORGE,
    SPECULATORS,
    canonical_name,
    drafter_config,
    format_of,
    parse_drafter_config,
)
from treeflash.drafters.loading import check_shapes
from treeflash.drafters.speculators import IGNORED
from treeflash.drafters.treeflash import HEAD_PREFIX
from treeflash.errors import CheckpointError, ConfigError

Config = dict[str, Any]
Tensors = dict[str, dict[str, Any]]
"""By name: `dtype`, `shape` and `data`, as a safetensors file holds them."""
SOURCES = {
    "treeflash": (DFLASH,),
    "speculators": (DFLASH, DFLASH2, DEEPSPEC, SPECFORGE),
    "dflash": (SPECULATORS,),
    "deepspec": (SPECULATORS,),
}
"""What each is converted from."""
FORMATS = tuple(SOURCES)
HEADS = {
    "speculators": ("selector", *markov.HEADS),
    "dflash": ("selector",),
    "deepspec": markov.HEADS,
}
"""Conditional heads that each has."""
ARCHITECTURES = {
    "dflash": "DFlashDraftModel",
    "dflash2": "DFlash2DraftModel",
    "dspark": "DSparkDraftModel",
}


def convert(folder: Path, output: Path, to: str, *, target: str | None = None) -> None:
    """Write a drafter in another format.

    Args:
        folder: of the drafter.
        output: a folder that does not exist, or is empty.
        to: one of `FORMATS`: `treeflash` adds a head that changes nothing to a DFlash drafter;
            `speculators` takes z-lab's DFlash and DFlash2, DeepSpec's DSpark and DFlash, and
            SpecForge's DSpark; `dflash` (z-lab's DFlash and DFlash2) and `deepspec` lead back.
        target: name of the target, which `speculators` needs.

    Raises:
        CheckpointError: the folder is not a drafter, or is damaged.
        ConfigError: the format cannot express the drafter, or `output` is not empty.
    """
    parsed, config = drafter_config(folder), read_config(folder)
    source = format_of(config)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not an empty folder")
    if to not in FORMATS:
        raise ConfigError(f"unknown format {to!r}; choose one of {', '.join(FORMATS)}")
    wanted = SOURCES[to]
    if source not in wanted:
        names = " or ".join(each.name for each in wanted)
        raise ConfigError(f"{to} is converted from {names} drafters, this one is {source.name}")
    _refuse_what_differs(parsed, to)
    shapes = {canonical_name(name): shape for name, shape in stored_shapes(folder).items()}
    check_shapes(folder, parsed, shapes)
    tensors = _read(folder)
    if to == "treeflash":
        config, tensors = _with_head(config, tensors)
    elif to == "speculators":
        config = _to_speculators(config, parsed, target)
    elif to == "deepspec":
        config = _to_deepspec(config, parsed)
    else:
        own = set(tensors) & {"embed_tokens.weight", "lm_head.weight"}
        if own:
            raise ConfigError(f"dflash cannot express the drafter's own {min(own)}")
        config = _to_dflash(config, parsed)
    parse_drafter_config(config)
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    (output / "config.json").write_text(text, encoding="utf-8")
    _write(output / "model.safetensors", tensors)


def _refuse_what_differs(config: DrafterConfig, to: str) -> None:
    """Raise a ConfigError that names the first thing that the other format has not."""
    if to == "treeflash":
        return
    next_token = config.first_slot == 0
    differing: dict[str, object] = {
        "heads": config.head not in (None, *HEADS[to]),
        "a vocabulary of its own": config.draft_vocab_size,
        "sliding windows": any(config.sliding_windows),
        "causal full attention": any(config.causal),
        "a first token predicted by the root's slot": to == "dflash" and next_token,
        "a root's slot that predicts nothing": to == "deepspec" and not next_token,
        "a factor on its embeddings": config.input_scale != 1,
        "a factor on its logits": config.output_multiplier != 1,
        "a softcap": config.softcap is not None,
    }
    for name, present in differing.items():
        if present:
            raise ConfigError(f"{to} cannot express {name} as this drafter has")


def _with_head(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """A TreeFlash drafter whose linear head corrects by 0."""
    h = int(config["hidden_size"])
    head = {"d.weight": np.zeros((h, 2 * h)), "norm.weight": np.ones(h)}
    dtype = next(iter(tensors.values()))["dtype"]
    renamed = {f"model.{canonical_name(name)}": tensor for name, tensor in tensors.items()}
    for name, values in head.items():
        renamed[f"model.{HEAD_PREFIX}{name}"] = _stored(values, dtype)
    settings = {"ar_approximation": "linear", "candidate_tokens": 16}
    converted = config | {"architectures": ["TreeFlashDraftModel"], "treeflash_config": settings}
    return converted, renamed


def _to_speculators(config: Config, parsed: DrafterConfig, target: str | None) -> Config:
    if not target:
        raise ConfigError("speculators names the target in its configuration; pass --target")
    own = {"architectures", "auto_map", "block_size", "dflash_config", "target_layer_ids"}
    own |= {"mask_token_id", *markov.KEYS, *dflash2.KEYS}
    layers = {key: value for key, value in config.items() if key not in own}
    kind = {None: "dflash", "selector": "dflash2"}.get(parsed.head, "dspark")
    return {
        "architectures": [ARCHITECTURES[kind]],
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


def _head_settings(parsed: DrafterConfig) -> Config:
    """The settings of a head, under the names that all formats give them."""
    if parsed.head == "selector":
        return {
            "conv_kernel_size": parsed.conv_kernel_size,
            "conv_group_size": parsed.conv_group_size,
            "selector_rank": parsed.head_rank,
            "selector_top_k": parsed.selector_top_k,
        }
    if parsed.head is None:
        return {}
    return {
        "markov_rank": parsed.head_rank,
        "markov_head_type": parsed.head,
        "enable_confidence_head": parsed.confidence_head,
        "confidence_head_with_markov": parsed.confidence_with_markov,
    }


def _to_dflash(config: Mapping[str, Any], parsed: DrafterConfig) -> Config:
    kind = "dflash" if parsed.head is None else "dflash2"
    return {
        **config["transformer_layer_config"],
        "architectures": [ARCHITECTURES[kind]],
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


def _read(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in weight_files(folder):
        try:
            parts = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        for name, part in parts:
            check_dtype(path, name, part["dtype"])
            if name not in IGNORED:
                tensors[name] = part
    return tensors


def _write(path: Path, tensors: Tensors) -> None:
    """A safetensors file: the length of a header, the header, the data."""
    header: Config = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, part in tensors.items():
        start, end = end, end + len(part["data"])
        kept = {"dtype": part["dtype"], "shape": part["shape"], "data_offsets": [start, end]}
        header[name] = kept
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in tensors.values():
            file.write(part["data"])


def _stored(values: NDArray[np.float64], dtype: str) -> dict[str, Any]:
    """0 and 1 are exact in every type."""
    if dtype == "BF16":  # the upper half of a float32
        data = (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        data = values.astype(f"<f{int(dtype[1:]) // 8}").tobytes()
    return {"dtype": dtype, "shape": list(values.shape), "data": data}
