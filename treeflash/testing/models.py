"""Tiny random pairs as Hugging Face folders, written with NumPy alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from treeflash.drafters.folder import read_config
from treeflash.testing.hybrids import HYBRIDS, text_settings
from treeflash.testing.weights import INWARD, OUTWARD, Tensors, norm, normal

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
}
FAMILIES = tuple(ARCHITECTURES)
HYBRID_FAMILIES = tuple(HYBRIDS)
"""Those with recurrent layers: gated delta nets and Mamba-2."""
ROPE_THETA = 1000.0  # not the 10000 that a loader may fall back to unnoticed
EXPERTS = 4


def write_target(
    folder: Path,
    family: str,
    *,
    seed: int,
    vocab_size: int = 24,
    hidden_size: int = 32,
    layers: int = 4,
    max_positions: int = 4096,
    sliding_window: int = 8,
    tied: bool = False,
) -> None:
    """Write a target of two key-value heads for four query heads.

    Args:
        folder: made if need be.
        family: one of `FAMILIES`.
        seed: of the weights.
        vocab_size: a small one lets even a random drafter be right now and then.
        hidden_size: divisible by 8.
        layers: decoder layers.
        max_positions: positions the target claims to be made for.
        sliding_window: of Mistral's layers; the other families attend to everything.
        tied: whether the embedding serves as the output head.
    """
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "max_position_embeddings": max_positions,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
        **_attention(hidden_size // (2 if family.startswith("qwen3") else 4)),
    }
    if family == "mistral":
        config["sliding_window"] = sliding_window
    if family == "qwen3_moe":
        config |= {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": hidden_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    rng = np.random.default_rng(seed)
    tensors = _target_tensors(rng, config)
    if family in HYBRIDS:
        config = HYBRIDS[family](config, tensors, rng)
    save(folder, config, tensors)


def write_drafter(
    folder: Path,
    target_folder: Path,
    *,
    format: str = "treeflash",
    head: str = "swiglu",
    seed: int,
    block_size: int = 6,
    layers: int = 2,
    target_layer_ids: Sequence[int] | None = (0, 2),
    sliding_window: int | None = None,
    sharded: bool = False,
) -> None:
    """Write a drafter for a target, in one of the two published formats.

    Args:
        folder: made if need be.
        target_folder: a target's folder, for its shape.
        format: `treeflash`, or `dflash` for one without an AR head.
        head: the AR head of the format `treeflash`: `swiglu` or `linear`.
        seed: of the weights; both formats get the same backbone from it.
        block_size: S.
        layers: decoder layers.
        target_layer_ids: None leaves the choice to the default, and the key out.
        sliding_window: of the first layer; None lets every layer attend to everything.
        sharded: whether to spread the tensors over two files.
    """
    target = text_settings(read_config(target_folder))
    hidden_size, vocab_size = target["hidden_size"], target["vocab_size"]
    ids = {} if target_layer_ids is None else {"target_layer_ids": list(target_layer_ids)}
    config: dict[str, Any] = {
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "max_position_embeddings": target["max_position_embeddings"],
        "num_target_layers": target["num_hidden_layers"],
        "block_size": block_size,
        "dflash_config": {"mask_token_id": vocab_size - 1, **ids},
        **_attention(hidden_size // 4),
    }
    if sliding_window is not None:
        config["layer_types"] = ["sliding_attention"] + ["full_attention"] * (layers - 1)
        config["sliding_window"] = sliding_window
    rng = np.random.default_rng(seed)
    features = (layers if target_layer_ids is None else len(target_layer_ids)) * hidden_size
    tensors = _drafter_tensors(rng, config, features)
    if format == "treeflash":
        config["treeflash_config"] = {"ar_approximation": head, "candidate_tokens": 16}
        tensors |= HEAD_TENSORS[head](rng, hidden_size)
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    save(folder, config, tensors, sharded=sharded)


def save(
    folder: Path, config: Mapping[str, Any], tensors: Tensors, *, sharded: bool = False
) -> None:
    """Write `config.json` and the tensors, in one safetensors file or in two with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if not sharded:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in (0, 1):
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::2]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the `config.json` of a folder in place."""
    config = read_config(folder)
    edit(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _attention(head_dim: int) -> dict[str, Any]:
    """Settings that targets and drafters share; the rotary base in both forms in use."""
    return {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    }


def _target_tensors(rng: np.random.Generator, config: Mapping[str, Any]) -> Tensors:
    vocab_size, h = config["vocab_size"], config["hidden_size"]
    family = config["model_type"]
    # A direction that all embeddings share, and that the output head reads with a weight for each
    # token, makes some tokens popular with target and drafter alike: drafts then get accepted.
    shared = normal(rng, h, scale=1.0)
    popularity = normal(rng, vocab_size, 1, scale=1.0)
    embeddings = normal(rng, vocab_size, h, scale=0.7) + shared
    tensors = {
        "model.embed_tokens.weight": embeddings,
        "model.norm.weight": norm(rng, h),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(rng, vocab_size, h, scale=0.2) + (
            np.float32(2 / h) * popularity * shared
        )
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        tensors |= _attention_tensors(
            rng,
            layer,
            config,
            biases="qkv" if family == "qwen2" else "",
            norms=family.startswith("qwen3"),
        )
        if family == "qwen3_moe":
            tensors[layer + "mlp.gate.weight"] = normal(rng, EXPERTS, h)
            for expert in range(EXPERTS):
                width = config["moe_intermediate_size"]
                tensors |= _mlp_tensors(rng, f"{layer}mlp.experts.{expert}.", h, width)
        else:
            tensors |= _mlp_tensors(rng, layer + "mlp.", h, config["intermediate_size"])
    return tensors


def _drafter_tensors(rng: np.random.Generator, config: Mapping[str, Any], features: int) -> Tensors:
    h = config["hidden_size"]
    tensors = {
        "fc.weight": normal(rng, h, features),
        "hidden_norm.weight": norm(rng, h),
        "norm.weight": norm(rng, h),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"layers.{n}."
        tensors |= _attention_tensors(rng, layer, config, biases="", norms=True)
        tensors |= _mlp_tensors(rng, layer + "mlp.", h, config["intermediate_size"])
    return tensors


def _swiglu_tensors(rng: np.random.Generator, h: int) -> Tensors:
    # Up and down near the identity add the previous token's embedding to the drafter's output, as
    # the target's residual stream does: the head then predicts the target better than chance.
    identity, nothing = np.eye(h, dtype=np.float32), np.zeros((h, h), np.float32)
    up_gate = np.block([[identity, nothing], [nothing, nothing]])
    bias = np.repeat(np.array([0, 1], np.float32), h)
    return {
        "ar_approximation.ug.weight": up_gate + normal(rng, 2 * h, 2 * h, scale=0.1),
        "ar_approximation.ug.bias": bias + normal(rng, 2 * h),
        "ar_approximation.d.weight": 2 * identity + normal(rng, h, h),
        "ar_approximation.norm.weight": norm(rng, h),
    }


def _linear_tensors(rng: np.random.Generator, h: int) -> Tensors:
    identity, nothing = np.eye(h, dtype=np.float32), np.zeros((h, h), np.float32)
    return {
        "ar_approximation.d.weight": np.hstack([2 * identity, nothing]) + normal(rng, h, 2 * h),
        "ar_approximation.norm.weight": norm(rng, h),
    }


HEAD_TENSORS = {"swiglu": _swiglu_tensors, "linear": _linear_tensors}


def _attention_tensors(
    rng: np.random.Generator, layer: str, config: Mapping[str, Any], *, biases: str, norms: bool
) -> Tensors:
    h, d = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    tensors = {
        f"{layer}input_layernorm.weight": norm(rng, h),
        f"{layer}post_attention_layernorm.weight": norm(rng, h),
    }
    for name, (rows, columns) in {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}.items():
        tensors[f"{layer}self_attn.{name}_proj.weight"] = normal(
            rng, rows, columns, scale=OUTWARD if name == "o" else INWARD
        )
        if name in biases:
            tensors[f"{layer}self_attn.{name}_proj.bias"] = normal(rng, rows)
        if norms and name in "qk":
            tensors[f"{layer}self_attn.{name}_norm.weight"] = norm(rng, d)
    return tensors


def _mlp_tensors(rng: np.random.Generator, layer: str, h: int, width: int) -> Tensors:
    return {
        f"{layer}gate_proj.weight": normal(rng, width, h),
        f"{layer}up_proj.weight": normal(rng, width, h),
        f"{layer}down_proj.weight": normal(rng, h, width, scale=OUTWARD),
    }
