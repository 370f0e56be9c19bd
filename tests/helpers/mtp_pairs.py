"""Tiny random targets with heads that draft depth by depth."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from families import by_name
from safetensors.numpy import save_file

from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters import mtp_formats
from treeflash.drafters.folder import read_config
from treeflash.drafters.format import Format
from treeflash.drafters.mtp_tensors import mtp_shapes
from treeflash.testing.models import edit_config, normal, save, write_target

HEADS = by_name(json.loads((Path(__file__).parent / "mtp_heads.json").read_text("utf-8")))
"""The settings of heads; the ones of `mtp` are in the target's folder."""
VARIANTS = ("glm-latents-halves",)
"""Heads for tests of numbers alone."""
SETTINGS = tuple(name for name in HEADS if name not in VARIANTS)
MARKS = {
    "qwen": ("mtp.fc.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.layers.0.mlp.gate.weight"),
    "glm": ("model.layers.4.eh_proj.weight",),
}
"""The tensors that tell the format, by the first part of a kind's name."""


def write_mtp_pair(
    root: Path, kind: str, seed: int = 0, *, vocab_size: int = 24, **settings: Any
) -> tuple[Path, Path]:
    """The folders of a target of 4 layers and of an MTP head for it, which `mtp` heads share.

    The settings join an EAGLE-3 head's configuration.
    """
    target = root / "target"
    family = "qwen3_5" if kind == "mtp" else "qwen3"
    write_target(target, family, seed=seed, vocab_size=vocab_size)
    return target, write_head(root / "head", target, kind, seed + 1, **settings)


def write_head(head: Path, target: Path, kind: str, seed: int, **settings: Any) -> Path:
    """Write a head for a target; return its folder, which is the target's for `mtp`."""
    shape, rng = _shape(target), np.random.default_rng(seed)
    if kind == "mtp":
        edit_config(target, lambda config: config.get("text_config", config).update(HEADS[kind]))
        tensors = _tensors(rng, mtp_formats.QWEN_MTP, read_config(target), shape)
        save_file(tensors, target / "mtp.safetensors")
        return target
    drafter = _layers(shape, 1) | {"model_type": "llama"} | HEADS[kind] | settings
    marks = MARKS.get(kind.partition("-")[0], ())
    format = mtp_formats.detect(drafter, marks)
    assert format is not None
    save(head, drafter, _tensors(rng, format, drafter, shape, marks))
    return head


def _shape(target: Path) -> dict[str, Any]:
    """The settings of a target's text."""
    config = read_config(target)
    return {**config, **config.get("text_config", {})}


def _layers(shape: dict[str, Any], count: int) -> dict[str, Any]:
    """The settings of a drafter's layers that are as wide as its target's."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    widths = {key: shape[key] for key in (*keys, "num_key_value_heads", "rms_norm_eps")}
    return widths | {"num_hidden_layers": count}


def assert_rows_are_paths(
    table: TransitionTable, root: int, log_probs: Callable[[list[int]], Any]
) -> None:
    """Assert that every row of a table has what a function computes after its path alone."""
    known = {0: [root]}
    for depth in range(table.depths):
        below: dict[int, list[int]] = {}
        for row, path in known.items():
            tokens = table.tokens[depth, row]
            expected = log_probs(path)[-1][tokens]
            np.testing.assert_allclose(table.log_probs[depth, row], expected, atol=1e-4)
            for token, following in zip(tokens, table.next_row[depth, row], strict=True):
                if following >= 0:
                    below[int(following)] = [*path, int(token)]
        known = below


def write_peagle_pair(root: Path, seed: int = 0) -> tuple[Path, Path]:
    """The folders of a target of 4 layers and of a P-EAGLE drafter of 2 layers for it."""
    target, head = write_mtp_pair(root, "eagle3", seed)
    write_peagle_head(head, target, seed)
    return target, head


def write_peagle_head(head: Path, target: Path, seed: int = 0) -> None:
    """The folder of a P-EAGLE drafter of 2 layers for a target."""
    shape = _shape(target)
    drafter = {
        "speculators_model_type": "peagle",
        "mask_token_id": 7,
        "draft_vocab_size": 16,
        "fc_norm": True,
        "speculators_config": {"proposal_methods": [{"speculative_tokens": 5}]},
        "transformer_layer_config": _layers(shape, 2),
    }
    rng = np.random.default_rng(seed + 2)
    tensors = _tensors(rng, mtp_formats.PEAGLE, drafter, shape)
    tensors["embed_tokens.weight"] = normal(rng, shape["vocab_size"], shape["hidden_size"])
    save(head, drafter, tensors)


def _tensors(
    rng: np.random.Generator,
    format: Format,
    config: dict[str, Any],
    shape: dict[str, Any],
    marks: Sequence[str] = (),
) -> dict[str, Any]:
    """Random tensors under their stored names."""
    parsed = format.parse(config, marks, shape["num_hidden_layers"])
    tensors: dict[str, Any] = {}
    for name, size in mtp_shapes(parsed, shape["vocab_size"]).items():
        stored = _stored_name(name, format, config)
        if name == "d2t":
            ids = np.sort(rng.permutation(shape["vocab_size"])[: size[0]])
            tensors[stored] = ids - np.arange(len(ids))
        elif name.endswith(("norm.weight", "scalar")) or name.startswith("fc_norm"):
            tensors[stored] = 1 - np.float32(parsed.norm_offset) + normal(rng, *size, scale=0.1)
        elif name.endswith("correction.bias"):  # every expert's rank is below 0
            tensors[stored] = normal(rng, *size, scale=0.3) - np.float32(2)
        elif name != "embed_tokens.weight":
            tensors[stored] = normal(rng, *size, scale=0.6 if name == "lm_head.weight" else 0.3)
    return tensors


def _stored_name(name: str, format: Format, config: dict[str, Any]) -> str:
    """The name under which a format stores a tensor."""
    if format is mtp_formats.GLM_MTP:
        renamed = {
            "layer.": "",
            "embedding_norm": "enorm",
            "hidden_norm": "hnorm",
            "input_proj": "eh_proj",
            "shared_expert.": "shared_experts.",
            "correction.bias": "e_score_correction_bias",
            "kv_b": "kv_b_proj.weight",
        }
        if name == "norm.weight":
            name = "shared_head.norm.weight"
        if not config.get("q_lora_rank"):
            renamed["q_b_proj"] = "q_proj"
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        return f"model.layers.4.{name}"
    if format is mtp_formats.QWEN_MTP:
        renamed = {
            "input_proj": "fc",
            "embedding_norm": "pre_fc_norm_embedding",
            "hidden_norm": "pre_fc_norm_hidden",
        }
        first, _, rest = name.replace("layer.", "layers.0.", 1).partition(".")
        return f"mtp.{renamed.get(first, first)}.{rest}"
    if name.startswith("further_layers."):
        return name.replace("further_layers.0", "layers.1")
    renamed = {"embedding_norm": "midlayer.input_layernorm", "hidden_norm": "midlayer.hidden_norm"}
    first, _, rest = name.replace("layer.", "midlayer.", 1).partition(".")
    return f"{renamed.get(first, first)}.{rest}" if rest else name
