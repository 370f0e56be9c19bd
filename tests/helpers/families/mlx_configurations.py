"""Small configurations of mlx-lm's model types, with all the kinds of layers that a type has."""

from __future__ import annotations

from typing import Any

from . import LAYERS, VOCAB_SIZE, WINDOW

SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
LINEAR = ["linear_attention", "full_attention"] * (LAYERS // 2)
THETA = 1000.0

# Small values for the fields of mlx-lm's `ModelArgs`.
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
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), VOCAB_SIZE),
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
    # Recurrent and convolutional layers.
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "time_step_rank"), 16),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv", "linear_conv_kernel_dim", "conv1d_width"), 4),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"), 16),
    **dict.fromkeys(("use_conv_bias", "mamba_conv_bias"), True),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "group_norm_size"), 1),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "layer_group_size"), 2),
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "time_step_limit": [0.0, 1.0],
    "full_attention_interval": 2,
    "linear_allow_neg_eigval": True,
    "logits_soft_cap": 30.0,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
}
ROPE = {"rope_type": "default", "rope_theta": THETA}
ROPE_BY_LAYER = {"sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 5 * THETA}}
YARN = {
    **ROPE,
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    **ROPE,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BETA = {**YARN, "llama_4_scaling_beta": 0.1}
ZERO_EXPERTS = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "zero_expert_num": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
GEMMA4_ROPE = {
    **ROPE_BY_LAYER,
    "full_attention": {**ROPE, "rope_type": "proportional", "partial_rotary_factor": 0.25},
}
KDA = {
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
}
# Settings of single types: those that no other type has, and names that mean something else.
OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 64, "num_layers": 4, "num_kv_reuse_layers": 2},
    "apertus": {"post_norm": False, "rope_scaling": LLAMA3},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": THETA},
    },
    "deepseek_v41": {
        "compress_ratios": [0, 4, 0, 4],
        "kv_source_layer_ids": [1, 3],
        "index_source_layer_ids": [1, 3],
    },
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "falcon_h1": {"mamba_rms_norm": True},
    "gear": {"layer_types": ["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"]},
    "gemma4_text": {
        "rope_parameters": GEMMA4_ROPE,
        "num_kv_shared_layers": 2,
        "enable_moe_block": True,
    },
    "gemma4": {
        "rope_parameters": GEMMA4_ROPE,
        "num_kv_shared_layers": 2,
        "global_head_dim": 16,
        "enable_moe_block": True,
    },
    "glm_moe_dsa": {"rope_parameters": ROPE, "topk_method": "noaux_tc"},
    "gpt_oss": {"rope_scaling": YARN},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * (LAYERS // 2),
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
    },
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 2.0},
    },
    "iquestloopcoder": {"loop_window_size": WINDOW},
    "kimi_k3": {
        "linear_attn_config": KDA,
        "num_key_value_heads": 4,
        "hidden_act": "situ",
        "activation_situ_beta": 1.0,
        "activation_situ_linear_beta": 1.0,
        "attn_res_block_size": 2,
    },
    "kimi_linear": {
        "linear_attn_config": KDA,
        "num_key_value_heads": 4,
        "model_max_length": 512,
        "moe_router_activation_func": "sigmoid",
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * (LAYERS // 2),
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 96,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * (LAYERS // 2),
        "conv_bias": False,
        "conv_L_cache": 3,
        "use_expert_bias": True,
        "num_dense_layers": 1,
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
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 2.0}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.0}},
        ]
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "E"]},
    "olmo_hybrid": {"layer_types": LINEAR},
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
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_vl": {"model_type": "qwen3"},
    "qwen3_vl_moe": {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv7": dict.fromkeys(
        ("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"), 8
    ),
    "spark2_5": {"rope_parameters": ROPE_BY_LAYER, "hidden_act": "gelu"},
    "stablelm": {"qk_layernorm": True},
    "step3p5": {
        "swiglu_limits": [0.0, 7.0, 7.0, 0.0],
        "num_attention_groups": 2,
        "moe_top_k": 2,
        "moe_layers_enum": "1,2,3",
        "share_expert_dim": 32,
    },
}

# Classes that a type's module defines and its checkpoints need not have: for adapters, for models
# spread over several devices, for sizes of the type without experts, or never used.
OPTIONAL: dict[str, set[str]] = {
    "afm7": {"FusedLoRALinear", "FusedQuantizedLinear"},
    "granitemoehybrid": {"GraniteMoeHybridMLP"},
    "internlm3": {"DynamicNTKScalingRoPE"},
    "minimax": {"ShardedRMSNorm"},
    "minimax_m2": {"ShardedRMSNorm"},
}
