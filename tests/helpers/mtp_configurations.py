"""Configurations of heads that draft depth by depth, in each format, and tensors for them."""

from __future__ import annotations

from typing import Any

import numpy as np

LAYER = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 16.0,
    "vocab_size": 10,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 5}
QWEN = {**LAYER, "model_type": "qwen3_5", "num_hidden_layers": 12, "mtp_num_hidden_layers": 1}
QWEN_MOE = {**QWEN, **EXPERTS, "num_experts": 3, "shared_expert_intermediate_size": 6}
GLM = {
    **LAYER,
    **EXPERTS,
    "model_type": "glm4_moe",
    "num_hidden_layers": 12,
    "n_routed_experts": 3,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    **GLM,
    "kv_lora_rank": 6,
    "q_lora_rank": 5,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2,
    "v_head_dim": 7,
}
EAGLE = {
    **LAYER,
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
}
SPECULATORS = {
    "speculators_model_type": "eagle3",
    "transformer_layer_config": {**LAYER, "num_hidden_layers": 1},
}
PARALLEL = {
    "speculators_model_type": "peagle",
    "mask_token_id": 9,
    "eagle_aux_hidden_state_layer_ids": [2, 5],
    "speculators_config": {"proposal_methods": [{"speculative_tokens": 6}]},
    "transformer_layer_config": {**LAYER, "num_hidden_layers": 3},
}
DEEPSPEC = {
    **LAYER,
    "architectures": ["Qwen3Eagle3Model"],
    "model_type": "qwen3",
    "num_hidden_layers": 1,
    "draft_num_hidden_layers": 1,
    "target_layer_ids": [0, 2, 4, 5, 7],
    "target_model_name_or_path": "target",
    "ttt_length": 7,
    "step_loss_decay": 0.8,
}
DEEPSPEC_GEMMA4 = {
    **DEEPSPEC,
    "architectures": ["Gemma4Eagle3Model"],
    "attention_k_eq_v": True,
    "enable_moe_block": False,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0,
    "layer_types": ["full_attention"],
    "model_type": "gemma4_text",
    "num_global_key_value_heads": 2,
    "num_kv_shared_layers": 0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 16.0,
            "partial_rotary_factor": 0.5,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 4.0},
    },
    "target_model_type": "gemma4_unified",
    "use_bidirectional_attention": "vision",
    "vocab_size_per_layer_input": 262144,
}
SPECULATORS_QWEN = {
    "speculators_model_type": "mtp",
    "num_nextn_predict_layers": 1,
    "transformer_layer_config": QWEN,
}
ASSISTANT_LAYERS = {
    **LAYER,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "global_head_dim": 6,
    "sliding_window": 4,
}
GEMMA = {
    "model_type": "gemma4_assistant",
    "backbone_hidden_size": 16,
    "text_config": ASSISTANT_LAYERS,
}
MTP_NAMES = ("mtp.fc.weight", "mtp.pre_fc_norm_hidden.weight")


def tensors(*names: str) -> dict[str, Any]:
    return {name: np.zeros(1, np.float32) for name in names}
