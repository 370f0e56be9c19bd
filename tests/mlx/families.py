"""Try every model type of mlx-lm, from a tiny random configuration, and print which can branch.

    python tests/mlx/families.py [model_type ...]

A type is `verified` when a random tree, after a prefix longer than any sliding window, has the
logits of its paths run as plain text; `refused` when loading it raises an error that says why.
`not tried` means that this script's generic configuration does not make such a model.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import MODEL_REMAPPING
from treeflash_mlx.backend import MlxBackend
from treeflash_mlx.target import Target

from treeflash.decoding.probe import tree_difference
from treeflash.errors import TreeflashError, UnsupportedModelError

WINDOW = 8
PREFIX = 24
TOLERANCE = 1e-4
LAYERS = 4
SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
THETA = 1000.0

# What fields of mlx-lm's `ModelArgs` are called, and values that make a small model.
FIELDS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim", "dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_transformer_layers"), LAYERS),
    **dict.fromkeys(("num_layers", "num_kv_reuse_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_num"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "hidden_size_per_head", "attention_head_dim"), 16),
    **dict.fromkeys(
        ("intermediate_size", "ffn_hidden_size", "n_inner", "ff_intermediate_size"), 96
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("num_experts_per_topk", "experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), 1e-5),
    **dict.fromkeys(("norm_epsilon", "layernorm_epsilon", "layer_norm_rms_epsilon"), 1e-5),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "swa_rope_theta"), THETA),
    **dict.fromkeys(("rotary_emb_base", "rope_freq_constant", "rotary_base"), THETA),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_pct"), 0.5),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), WINDOW),
    "rotary_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "sliding_window_pattern": 2,
    "layer_types": SLIDING,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "qk_norm": True,
    "rope_traditional": False,
    "rope_scaling": None,
    "hidden_act": "silu",
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "routed_scaling_factor": 1.0,
    "query_pre_attn_scalar": 16,
    "no_rope_layers": [1, 1, 1, 0],
    "no_rope_layer_interval": 4,
    "cla_share_factor": 2,
    "num_hidden_layers_per_block": 1,
}
ROPE = {"rope_type": "default", "rope_theta": THETA}
ROPE_BY_LAYER = {"sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 5 * THETA}}
BETA = {**ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
ZERO_EXPERTS = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "zero_expert_num": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
# Settings of single types: what no other has, or where a shared name means something else.
OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 64, "num_layers": 4, "num_kv_reuse_layers": 2},
    "apertus": {"post_norm": False},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": THETA},
    },
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 96,
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4_text": {"layer_types": SLIDING, "num_kv_shared_layers": 0},
    "gemma4": {"rope_parameters": ROPE_BY_LAYER, "num_kv_shared_layers": 0, "global_head_dim": 16},
    "granitemoehybrid": {"layer_types": ["attention"] * LAYERS},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 2.0},
    },
    "lille-130m": {"block_size": 512},
    "longcat_flash": ZERO_EXPERTS,
    "longcat_flash_ngram": {**ZERO_EXPERTS, "ngram_vocab_size_ratio": 2},
    "mellum": {"rope_parameters": ROPE_BY_LAYER},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "topk_method": "noaux_tc",
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "attention_value_scale": 1.0,
    },
    "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2},
    "minicpm3": {
        "dim_model_base": 32,
        "scale_depth": 1.4,
        "scale_emb": 2,
        "rope_scaling": {
            "original_max_position_embeddings": 64,
            "short_factor": 1.0,
            "long_factor": 2.0,
        },
    },
    "ministral3": {"rope_parameters": BETA},
    "mistral3": {"model_type": "llama"},
    "mistral4": {"rope_parameters": BETA, "rope_interleave": True},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}} for _ in range(LAYERS)
        ],
    },
    "openelm": {
        "ffn_dim_divisor": 16,
        "num_query_heads": [4] * LAYERS,
        "num_kv_heads": [2] * LAYERS,
        "ffn_multipliers": [2.0] * LAYERS,
    },
    "phixtral": {"num_vocab": 96, "rotary_dim": 16},
    "pixtral": {"model_type": "llama"},
    "plamo": {"n_shared_head": 2},
    "qwen2_vl": {"model_type": "qwen2"},
    "qwen3_vl": {"model_type": "qwen3"},
    "qwen3_vl_moe": {"model_type": "qwen3_moe"},
    "spark2_5": {"rope_parameters": ROPE_BY_LAYER, "hidden_act": "gelu"},
    "step3p5": {
        "num_attention_groups": 2,
        "moe_top_k": 2,
        "moe_layers_enum": "1,2,3",
        "share_expert_dim": 32,
    },
}


def main(names: list[str]) -> None:
    """Print a line per model type, and the totals."""
    mx.set_default_device(mx.cpu)
    outcomes: dict[str, list[str]] = {}
    for name in names or model_types():
        outcome, why = attempt(name)
        outcomes.setdefault(outcome, []).append(name)
        print(f"{name:24} {outcome:10} {why}", flush=True)
    for outcome, of_it in sorted(outcomes.items()):
        print(f"\n{outcome}: {len(of_it)}\n  {', '.join(of_it)}")


def model_types() -> list[str]:
    """The modules of mlx-lm that define a model, and the other names it has for them."""
    folder = Path(mlx_lm.models.__path__[0])
    modules = {path.stem for path in folder.glob("*.py") if "class Model(" in path.read_text()}
    return sorted(modules | {name for name, of in MODEL_REMAPPING.items() if of in modules})


def attempt(name: str) -> tuple[str, str]:
    """(verified, refused or not tried; how exactly or why)."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            write(Path(folder), name)
        except (Exception, SystemExit) as error:
            return "not tried", f"{type(error).__name__}: {str(error)[:90]}"
        try:
            target = Target(Path(folder), mx.float32, None)
            target.check_drafting()
            error = tree_difference(
                MlxBackend(target, None, None), np.random.default_rng(0), PREFIX
            )
        except UnsupportedModelError as error:
            return "refused", str(error)
        except TreeflashError as error:
            return "not tried", str(error)
        except Exception as error:  # what `check_trees` makes a refusal of
            return "refused", f"probe: {type(error).__name__}: {str(error)[:90]}"
    if error > TOLERANCE:
        return "refused", f"probe: differs by {error:.1e}"
    return "verified", f"{error:.0e}"


def write(folder: Path, name: str) -> None:
    """Save a random model of that type, as mlx-lm would convert it."""
    module = module_of(name)
    config = configuration(name)
    model = module.Model(module.ModelArgs.from_dict(config))
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    weights = {path: random(rng, path, x) for path, x in tree_flatten(model.parameters())}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def configuration(name: str) -> dict[str, Any]:
    """Values for the fields of a type's `ModelArgs`, or of the text model inside it."""
    known = inspect.signature(module_of(name).ModelArgs).parameters
    own = OVERRIDES.get(MODEL_REMAPPING.get(name, name), {})
    if "text_config" in known:
        return {"text_config": {"model_type": f"{name}_text", **FIELDS, **own}, "model_type": name}
    return {**{k: v for k, v in FIELDS.items() if k in known}, **own, "model_type": name}


def module_of(name: str) -> Any:
    """The module of mlx-lm that runs a type."""
    return importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(name, name)}")


def random(rng: np.random.Generator, path: str, x: mx.array) -> mx.array:
    """Values that make attention sharp: a uniform one would hide wrong positions and masks."""
    if not mx.issubdtype(x.dtype, mx.floating):
        return x
    if x.ndim < 2:
        return x + mx.array(rng.normal(0, 0.1, x.shape), x.dtype)
    scale = 1.0 if "embed" in path or "wte" in path else 1.5 / np.sqrt(x.shape[-1])
    return mx.array(rng.normal(0, scale, x.shape), x.dtype)


if __name__ == "__main__":
    main(sys.argv[1:])
