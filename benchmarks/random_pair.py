"""A target and a TreeFlash drafter in published shapes, whose tensors are in no file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, TypeAlias, cast
from unittest import mock

from treeflash.config import LoadConfig
from treeflash.drafters.formats import DFLASH, drafter_shapes, parse_drafter_config
from treeflash.drafters.loading import arrange_block

ROPE = {"rope_type": "default", "rope_theta": 1e6}
QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": ROPE,
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
    "llama-8b": QWEN3
    | {"model_type": "llama", "num_hidden_layers": 32, "vocab_size": 128_256}
    | {"hidden_size": 4096, "intermediate_size": 14_336, "tie_word_embeddings": False},
    "gemma3-4b": QWEN3
    | {"model_type": "gemma3_text", "num_hidden_layers": 34, "vocab_size": 262_208}
    | {"hidden_size": 2560, "intermediate_size": 10_240, "tie_word_embeddings": True}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    | {"sliding_window": 1024, "query_pre_attn_scalar": 256}
    | {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE)},
    "qwen3-30b-a3b": QWEN3
    | {"model_type": "qwen3_moe", "num_hidden_layers": 48, "num_key_value_heads": 4}
    | {"hidden_size": 2048, "intermediate_size": 6144, "tie_word_embeddings": False}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "qwen3.5-9b": QWEN3
    | {"model_type": "qwen3_5_text", "num_hidden_layers": 32, "vocab_size": 248_320}
    | {"hidden_size": 4096, "intermediate_size": 12_288, "tie_word_embeddings": False}
    | {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256}
    | {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
    | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}},
}
MakeTensor: TypeAlias = Callable[[str, tuple[int, ...]], Any]
"""Makes a tensor of a name and a size."""
DRAFTER_LAYERS, BLOCK_SIZE, TOP_M, TOP_K = 5, 16, 16, 16
OF_LAYERS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
)
"""What a drafter's configuration has of its target's."""


def random_tensor(name: str, size: tuple[int, ...], device: Any, dtype: str) -> Any:
    """Make a random tensor of a model.

    The head is as at the start of training: with random weights most nodes would have no children.
    """
    import torch

    tensor = torch.empty(size, device=device, dtype=getattr(torch, dtype))
    if name.endswith("ar_approximation.d.weight"):
        return tensor.zero_()
    return tensor.fill_(1) if len(size) == 1 else tensor.normal_(std=0.02)


def load_pair(shape: dict[str, Any], settings: LoadConfig, make: MakeTensor) -> Any:
    """Load a pair in a published shape in PyTorch, whose tensors are made and not read."""
    import torch
    from transformers import AutoModelForCausalLM
    from treeflash_cuda import backend, drafter_loading, target_loading
    from treeflash_cuda.decoder.weights import Checkpoint
    from treeflash_cuda.hf import model_target

    class Tensors(Checkpoint):
        """Tensors of any names."""

        foreign = None

        def __init__(self, *_: Any) -> None:
            self.wholes, self.packed, self.tensors, self.place = {}, {}, {}, "model"

        def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
            return cast(torch.Tensor, make(name, shape))

    def load_model(_: Path, config: Any, dtype: torch.dtype, device: Any, **__: Any) -> Any:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="eager"
            )
        return model.eval()

    torch.manual_seed(0)
    config = parse_drafter_config(drafter_config(shape))
    shapes = drafter_shapes(config, shape["intermediate_size"])
    layout: Any = SimpleNamespace(format=DFLASH, config=config, shapes=shapes)
    layout.vocab_size = shape["vocab_size"]
    layout.read = lambda *_: arrange_block(layout, {x: make(x, size) for x, size in shapes.items()})
    with (
        TemporaryDirectory() as folder,
        mock.patch.object(drafter_loading, "read_layout", return_value=layout),
        mock.patch.object(model_target, "load_model", load_model),
        mock.patch.object(target_loading, "Checkpoint", Tensors),
    ):
        Path(folder, "config.json").write_text(json.dumps(shape), encoding="utf-8")
        return backend.load(Path(folder), Path(folder), settings)


def drafter_config(shape: dict[str, Any]) -> dict[str, Any]:
    """Build the `config.json` of a drafter for a target of this shape."""
    return {key: shape[key] for key in OF_LAYERS} | {
        "model_type": "qwen3",
        "rope_parameters": ROPE,
        "num_hidden_layers": DRAFTER_LAYERS,
        "num_target_layers": shape["num_hidden_layers"],
        "block_size": BLOCK_SIZE,
        "dflash_config": {"mask_token_id": shape["vocab_size"] - 1},
        "treeflash_config": {"ar_approximation": "swiglu", "candidate_tokens": TOP_M},
    }
