"""Tiny random drafters in the published dialects, for tests of loaders and heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from treeflash.drafters.folder import read_config, read_tensors
from treeflash.testing.models import save, write_drafter
from treeflash.testing.weights import Tensors, normal

Config = dict[str, Any]
RANK, CANDIDATES, DRAFT_VOCAB_SIZE = 8, 5, 16
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}


def _dflash(config: Config, tensors: Tensors, rng: np.random.Generator) -> None:
    """A factor, a softcap, a window and scaled embeddings."""
    config |= SLIDING
    config["dflash_config"] |= {
        "output_multiplier": 0.75,
        "final_logit_softcapping": 6.0,
        "input_embedding_scale": 1.25,
    }


def _dflash2(config: Config, tensors: Tensors, rng: np.random.Generator) -> None:
    config |= {"architectures": ["DFlash2DraftModel"], "is_causal": False, **SLIDING}
    config["dflash_config"] |= _selector(config, tensors, rng)


def _deepspec(head: str | None) -> Callable[[Config, Tensors, np.random.Generator], None]:
    def edit(config: Config, tensors: Tensors, rng: np.random.Generator) -> None:
        config["architectures"] = ["Qwen3DSparkModel"]
        config |= config.pop("dflash_config")
        if head is not None:
            config |= _markov(config, tensors, rng, head)
        config["target_layer_ids"] = [-1, 2]
        shape = config["vocab_size"], config["hidden_size"]
        tensors["embed_tokens.weight"] = normal(rng, *shape, scale=0.7)
        tensors["lm_head.weight"] = normal(rng, *shape, scale=0.3)

    return edit


def _specforge(config: Config, tensors: Tensors, rng: np.random.Generator) -> None:
    config["architectures"] = ["DSparkDraftModel"]
    head = _markov(config, tensors, rng, "vanilla")
    config["dflash_config"] |= {"projector_type": "dspark", "attention_mode": "gqa", **head}


def _domino(config: Config, tensors: Tensors, rng: np.random.Generator) -> None:
    """Fill-in slots, and a first depth that the head leaves alone."""
    h, states = config["hidden_size"], 6
    config["architectures"] = ["DominoDraftModel"]
    config["dflash_config"] |= {
        "projector_type": "domino",
        "emb_dim": RANK,
        "gru_hidden_dim": states,
        "pure_draft_prefix_len": 1,
        "shift_label": False,
    }
    tensors["prefix_gru.weight_ih_l0"] = normal(rng, 3 * states, h, scale=0.5)
    tensors["prefix_gru.weight_hh_l0"] = normal(rng, 3 * states, states, scale=0.7)
    tensors["embed_proj.0.weight"] = normal(rng, RANK, h + states, scale=0.5)
    tensors["embed_proj.2.weight"] = normal(rng, config["vocab_size"], RANK, scale=0.7)


def _speculators(
    kind: str, head: str | None, *, reduced: bool
) -> Callable[[Config, Tensors, np.random.Generator], None]:
    def edit(config: Config, tensors: Tensors, rng: np.random.Generator) -> None:
        own, layers = config.pop("dflash_config"), dict(config)
        block_size = layers.pop("block_size")
        settings: Config = {}
        if kind == "dflash2":
            settings = _selector(layers, tensors, rng)
        elif head is not None:
            rows = DRAFT_VOCAB_SIZE if reduced else layers["vocab_size"]
            settings = _markov(layers, tensors, rng, head, draft_vocab_size=rows)
        if reduced:
            chosen = np.sort(rng.permutation(layers["vocab_size"])[:DRAFT_VOCAB_SIZE])
            known = np.isin(np.arange(layers["vocab_size"]), chosen)
            tensors["d2t"] = (chosen - np.arange(DRAFT_VOCAB_SIZE)).astype(np.int64)
            tensors["t2d"] = known
            shape = DRAFT_VOCAB_SIZE, layers["hidden_size"]
            tensors["lm_head.weight"] = normal(rng, *shape, scale=0.3)
        config.clear()
        config |= {
            "architectures": ["DFlashDraftModel"],
            "speculators_model_type": kind,
            "transformer_layer_config": layers | SLIDING,
            "block_size": block_size,
            "mask_token_id": own["mask_token_id"],
            "aux_hidden_state_layer_ids": [i + 1 for i in own["target_layer_ids"]],
            "sample_from_anchor": kind == "dspark",
            "draft_vocab_size": DRAFT_VOCAB_SIZE if reduced else layers["vocab_size"],
            **settings,
        }

    return edit


DIALECTS: dict[str, Callable[[Config, Tensors, np.random.Generator], None]] = {
    "dflash": _dflash,
    "dflash2": _dflash2,
    "deepspec": _deepspec("vanilla"),
    "deepspec-gated": _deepspec("gated"),
    "deepspec-rnn": _deepspec("rnn"),
    "deepspec-dflash": _deepspec(None),
    "specforge": _specforge,
    "specforge-domino": _domino,
    "speculators-dflash": _speculators("dflash", None, reduced=True),
    "speculators-dflash2": _speculators("dflash2", None, reduced=False),
    "speculators-dspark": _speculators("dspark", "gated", reduced=True),
}
"""By name; what is not plain DFlash or TreeFlash in each."""


def write_dialect(folder: Path, target_folder: Path, dialect: str, *, seed: int) -> None:
    """Write a drafter of one of the `DIALECTS` for a target; see `write_drafter`."""
    write_drafter(folder, target_folder, format="dflash", seed=seed)
    config, tensors = read_config(folder), read_tensors(folder)
    DIALECTS[dialect](config, tensors, np.random.default_rng(seed))
    save(folder, config, tensors)


def _selector(config: Config, tensors: Tensors, rng: np.random.Generator) -> Config:
    """Add a selector and convolutions; returns their settings."""
    h, taps, group = config["hidden_size"], 2, 8
    for name in ("predecessor_codebook", "successor_codebook"):
        tensors[f"candidate_selector.{name}"] = normal(rng, config["vocab_size"], RANK, scale=0.7)
    tensors["candidate_selector.hidden_projection.weight"] = normal(rng, RANK, h)
    identity = np.zeros((2, taps, h), np.float32)
    identity[:, 0] = 1
    for n in range(config["num_hidden_layers"]):
        for part in ("attention_conv", "mlp_conv"):
            name = f"layers.{n}.{part}"
            tensors[f"{name}.base_kernel"] = identity + normal(rng, 2, taps, h, scale=0.1)
            shape = 2 * taps * (h // group), h
            tensors[f"{name}.kernel_projection.weight"] = normal(rng, *shape, scale=0.1)
    return {
        "conv_kernel_size": taps,
        "conv_group_size": group,
        "selector_rank": RANK,
        "selector_top_k": CANDIDATES,
    }


def _markov(
    config: Config,
    tensors: Tensors,
    rng: np.random.Generator,
    head: str,
    *,
    draft_vocab_size: int | None = None,
) -> Config:
    """Add a Markov head and a confidence head; returns their settings."""
    h, rows = config["hidden_size"], config["vocab_size"]
    tensors["markov_head.markov_w1.weight"] = normal(rng, rows, RANK, scale=0.7)
    tensors["markov_head.markov_w2.weight"] = normal(rng, draft_vocab_size or rows, RANK, scale=0.7)
    if head == "gated":
        tensors["markov_head.gate_proj.weight"] = normal(rng, RANK, h + RANK)
        tensors["markov_head.gate_proj.bias"] = normal(rng, RANK)
    if head == "rnn":
        tensors["markov_head.joint_proj.weight"] = normal(rng, 3 * RANK, 2 * RANK + h, scale=0.5)
        tensors["markov_head.joint_proj.bias"] = normal(rng, 3 * RANK)
    tensors["confidence_head.proj.weight"] = normal(rng, 1, h + RANK)
    tensors["confidence_head.proj.bias"] = normal(rng, 1)
    return {"markov_rank": RANK, "markov_head_type": head, "enable_confidence_head": True}
