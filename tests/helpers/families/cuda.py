"""Tiny random models of the model types of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.utils import logging
from treeflash_cuda.backend import CudaBackend
from treeflash_cuda.target_loading import load_target

from treeflash.config import LoadConfig

from . import LAYERS, PREFIX, TOKENS, VOCAB_SIZE, WINDOW

SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)

# Small values for keys of configurations; a type ignores the keys that it does not know.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "query_pre_attn_scalar": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {  # keys and values from a small latent vector; only part of a head is rotated
    "num_key_value_heads": 4,
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
}
LATENT_TYPES = (
    *("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3"),
    *("sarvam_mla", "youtu"),
)
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "norm_topk_prob": True,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
MAMBA_2 = {
    "num_heads": 8,
    "head_dim": 16,
    "state_size": 16,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "expand": 2,
    "chunk_size": 16,
}
RECURRENT = {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)}
CONVOLUTIONAL = {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)}
# Settings of single types.
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(LATENT_TYPES, LATENT),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), DELTA_NET | RECURRENT),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"), DELTA_NET | RECURRENT),
    "olmo_hybrid": DELTA_NET | RECURRENT | {"linear_allow_neg_eigval": True},
    "lara_mini": DELTA_NET,
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": MAMBA | RECURRENT | {"shared_intermediate_size": 32},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "mamba2": MAMBA_2,
    "nemotron_h": MAMBA_2
    | {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
        "moe_shared_expert_intermediate_size": 32,
        "head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * (LAYERS // 2),
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "chunk_size": 16,
        "adapter_rank": 4,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "use_mem_rope": True,
    },
    "bailing_hybrid": LATENT | RECURRENT | {"n_group": 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2},
    "kimi_linear": LATENT | RECURRENT,
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "lfm2": CONVOLUTIONAL,
    "lfm2_moe": CONVOLUTIONAL,
}


def prepare() -> None:
    """Leave out what transformers says about each model."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def model_types() -> list[str]:
    """Types that `AutoModelForCausalLM` can make."""
    return sorted(
        name for name, kind in CONFIG_MAPPING.items() if kind in MODEL_FOR_CAUSAL_LM_MAPPING
    )


def load(folder: Path) -> CudaBackend:
    """The backend with the target alone, before the checks at load."""
    target = load_target(folder, LoadConfig(device="cpu", dtype="float32"), pack=True)
    return CudaBackend(target, None, None)


def write_for_comparison(folder: Path, name: str) -> Callable[[], NDArray[np.float32]]:
    """Save a model, and return a function that gives transformers' logits."""
    expected = plain_logits(write(folder, name))
    return lambda: expected


def write(folder: Path, name: str, **fields: Any) -> Any:
    """Save a random model of that type, with some other fields; load it as transformers does."""
    config = configuration(name, **fields)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 10_000_000:
        raise ValueError("the settings of this type do not make it small")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:  # sharp attention: a uniform one would hide wrong positions and masks
                sharp = 1.0 if "embed" in path else 1.5 * parameter.shape[-1] ** -0.5
                parameter.normal_(0, sharp)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def configuration(name: str, **changes: Any) -> Any:
    """A small configuration with the kinds of layers that the type's default one has."""
    kind = CONFIG_MAPPING[name]
    small = SMALL | {"layer_types": layer_types(name)} | OVERRIDES.get(name, {}) | changes
    if "text_config" in kind.sub_configs:
        return kind(text_config=small)
    try:
        return kind(**small)
    except Exception:  # the type names its kinds of layers otherwise
        return kind(**{key: value for key, value in small.items() if key != "layer_types"})


def layer_types(name: str) -> list[str]:
    """The kinds of layers of the type's default configuration, by turns."""
    own = getattr(CONFIG_MAPPING[name]().get_text_config(), "layer_types", None) or []
    kinds = list(dict.fromkeys(own))
    if set(kinds) <= set(SLIDING):
        return SLIDING
    return [kinds[i % len(kinds)] for i in range(max(LAYERS, len(kinds)))]


def missing_layers(name: str, config: Any) -> set[str]:
    """Kinds of layers that the type's default configuration has, and this one lacks."""
    return default_layer_kinds(name) - layer_kinds(config)


def default_layer_kinds(name: str) -> set[str]:
    """The kinds in the model of the default configuration; empty if transformers has none."""
    try:
        return layer_kinds(CONFIG_MAPPING[name]())
    except (AttributeError, TypeError):  # a default configuration that makes no model
        return set()


def layer_kinds(config: Any) -> set[str]:
    """The classes of the modules that a configuration makes, and its names for its layers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = getattr(config.get_text_config(), "layer_types", None) or ()
    return {type(module).__name__ for module in model.modules()} | set(names)


def plain_logits(model: Any) -> NDArray[np.float32]:
    """The last token's logits by transformers alone; a recurrent model is given it as in decoding.

    Some of them limit the steps of a prompt's tokens, and not the steps of decoding.
    """
    token_ids = torch.tensor([TOKENS])
    with torch.inference_mode():
        if not getattr(model, "_is_stateful", False):
            return model(token_ids).logits[0, -1].numpy()
        before = model(token_ids[:, :-1], use_cache=True)
        names = [name for name in ("cache", "past_key_values", "cache_params") if name in before]
        step = {"position_ids": torch.tensor([[PREFIX - 1]]), names[0]: before[names[0]]}
        return model(token_ids[:, -1:], use_cache=True, **step).logits[0, -1].numpy()
