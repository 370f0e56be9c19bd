"""A target and a TreeFlash drafter of random weights, in published shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from treeflash.drafters.formats import drafter_shapes, parse_drafter_config

QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "qwen3-8b": QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12_288, "tie_word_embeddings": False},
    "tiny": QWEN3
    | {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True}
    | {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"head_dim": 16, "vocab_size": 2048},
}
DRAFTER_LAYERS, BLOCK_SIZE, TOP_M, TOP_K = 5, 16, 16, 16


def write_target(folder: Path, shape: dict[str, Any], device: Any, dtype: str) -> None:
    """Write a target of random weights, initialised on `device`."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=getattr(torch, dtype))
    # Each file passes through the memory of the host.
    model.save_pretrained(folder, max_shard_size="4GB")


def write_drafter(folder: Path, shape: dict[str, Any], device: Any, dtype: str) -> None:
    """Write a drafter of random weights for a target of this shape, initialised on `device`."""
    import torch
    from safetensors.torch import save_file

    config = drafter_config(shape)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    shapes = drafter_shapes(parse_drafter_config(config), shape["intermediate_size"])
    for name, size in shapes.items():
        tensor = torch.empty(size, device=device, dtype=getattr(torch, dtype))
        tensors[name] = (tensor.fill_(1) if len(size) == 1 else tensor.normal_(std=0.02)).cpu()
    # The head is as at the start of training: with random weights most nodes would have no
    # children.
    tensors["ar_approximation.d.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drafter_config(shape: dict[str, Any]) -> dict[str, Any]:
    """Build the `config.json` of a drafter for a target of this shape."""
    return shape | {
        "model_type": "qwen3",
        "num_hidden_layers": DRAFTER_LAYERS,
        "num_target_layers": shape["num_hidden_layers"],
        "block_size": BLOCK_SIZE,
        "dflash_config": {"mask_token_id": shape["vocab_size"] - 1},
        "treeflash_config": {"ar_approximation": "swiglu", "candidate_tokens": TOP_M},
    }
