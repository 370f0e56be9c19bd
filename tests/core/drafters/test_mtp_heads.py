"""The formats of heads that draft depth by depth: how they are told apart, and what they say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.drafters import mtp_heads
from treeflash.drafters.folder import open_folder, read_file, read_quantised
from treeflash.drafters.format import Format
from treeflash.drafters.loading import find_head_format, mtp_tensors, read_layout
from treeflash.drafters.mtp_formats import (
    ASSISTANT,
    DEEPSPEC_EAGLE3,
    EAGLE3,
    GEMMA4_EAGLE3,
    GLM_MTP,
    PEAGLE,
    QWEN_MTP,
    QWEN_SIDECAR,
    SPECULATORS_EAGLE3,
    SPECULATORS_MTP,
)
from treeflash.drafters.mtp_heads import Assistant, Experts, MtpConfig
from treeflash.drafters.mtp_tensors import mtp_shapes, split_fused, stack_experts
from treeflash.errors import CheckpointError, ConfigError, UnsupportedModelError
from treeflash.testing.models import save

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


@pytest.mark.parametrize(
    ("config", "names", "found"),
    [
        (QWEN, MTP_NAMES, QWEN_MTP),
        ({"text_config": QWEN, "model_type": "other"}, MTP_NAMES, QWEN_MTP),
        ({**QWEN, "model_type": "qwen3_next"}, MTP_NAMES, QWEN_MTP),
        (QWEN, MTP_NAMES[:1], None),
        ({"model_type": "qwen3_5_mtp"}, ("pre_fc_norm_hidden.weight",), QWEN_SIDECAR),
        ({"model_type": "qwen3_5_mtp"}, ("other.weight",), None),
        (GLM, ("model.layers.12.eh_proj.weight",), GLM_MTP),
        (GLM, ("model.layers.11.eh_proj.weight",), None),
        ({**GLM, "model_type": "deepseek_v3"}, ("model.layers.12.eh_proj.weight",), GLM_MTP),
        (EAGLE, ("x",), EAGLE3),
        ({"architectures": ["Eagle3Speculator"], "model_type": "x"}, ("x",), EAGLE3),
        ({**SPECULATORS, "architectures": ["Eagle3Speculator"]}, ("x",), SPECULATORS_EAGLE3),
        (DEEPSPEC, ("x",), DEEPSPEC_EAGLE3),
        (DEEPSPEC_GEMMA4, ("x",), GEMMA4_EAGLE3),
        (PARALLEL, ("x",), PEAGLE),
        (SPECULATORS_QWEN, ("x",), SPECULATORS_MTP),
        (GEMMA, ("x",), ASSISTANT),
        ({**GEMMA, "model_type": "gemma4_unified_assistant"}, ("x",), ASSISTANT),
        ({"architectures": ["Qwen3ForCausalLM"]}, ("model.embed_tokens.weight",), None),
    ],
)
def test_a_head_is_recognised(
    tmp_path: Path, config: dict[str, Any], names: tuple[str, ...], found: Format | None
) -> None:
    save(tmp_path / "head", config, tensors(*names))
    assert find_head_format(open_folder(tmp_path / "head")) is found


@pytest.mark.parametrize(
    ("config", "name", "family"),
    [
        ({}, "mtp.fc_hidden.weight", "in the layout of Qwen4"),
        ({}, "mtp.fc_embedding.weight", "in the layout of Qwen4"),
        ({}, "mtp.0.attn.weight", "in the layout of DeepSeek-V4"),
        ({}, "model.mtp_block.input_layernorm.weight", "in the layout of mlx-vlm's GLM-4.7-Flash"),
        ({}, "model.mtp_layers.0.input_proj.weight", "in the layout of MiMo"),
        ({}, "model.mtp.layers.0.eh_proj.weight", "in the layout of MiMo-V2"),
        ({}, "mtp.layers.0.eh_proj.weight", "in the layout of Nemotron-H"),
        ({}, "mtp_layers.0.input_proj.weight", "in the layout of speculators"),
        (
            {"model_type": "exaone_moe", "num_hidden_layers": 3},
            "model.layers.3.eh_proj.weight",
            "the MTP head of exaone_moe models is not supported; supported are glm4_moe",
        ),
        (
            {"speculators_model_type": "mtp", "transformer_layer_config": {"model_type": "qwen3"}},
            "x",
            "the MTP head of qwen3 models is not supported",
        ),
        ({"model_type": "mellum"}, MTP_NAMES, "the MTP head of mellum models is not supported"),
    ],
)
def test_heads_of_other_families_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], name: str | tuple[str, ...], family: str
) -> None:
    names = (name,) if isinstance(name, str) else name
    save(tmp_path / "head", config, tensors(*names))
    with pytest.raises(UnsupportedModelError, match=re.escape(family)):
        find_head_format(open_folder(tmp_path / "head"))


def test_a_configuration_that_tells_no_family(tmp_path: Path) -> None:
    for config, problem in (
        ({"speculators_model_type": "mtp"}, "lacks 'transformer_layer_config'; speculators"),
        ({"architectures": 3}, "is not valid: "),
    ):
        save(tmp_path / "head", config, tensors("x"))
        with pytest.raises(CheckpointError, match=f"config.json {problem}"):
            find_head_format(open_folder(tmp_path / "head"))


def parse(format: Format, config: dict[str, Any], *names: str, **changes: Any) -> MtpConfig:
    return format.parse({**config, **changes}, names, 12)


def check(config: MtpConfig, **expected: Any) -> None:
    assert {name: getattr(config, name) for name in expected} == expected


def test_mtp_of_qwen() -> None:
    config = parse(QWEN_MTP, QWEN, partial_rotary_factor=0.5, attention_bias=True)
    check(
        config,
        head="mtp",
        depths=8,
        target_layer_ids=(12,),
        num_target_layers=12,
        final_state=True,
        reads_both=False,
        normed_feedback=True,
        gated=True,
        qk_norm=True,
        attention_bias=True,
        output_bias=True,
        norm_offset=1.0,
        intermediate_size=12,
        experts=None,
        inv_freq=(1.0,),
        causal=(True,),
        sliding_windows=(None,),
        own_vocabulary=False,
        has_marginals=False,
        scratch_rows=1 + 16 * 7,
        column_size=2 * 4 + 8,
    )
    check(parse(QWEN_MTP, QWEN), output_bias=False, inv_freq=(1.0, 0.25))
    assert parse(QWEN_SIDECAR, QWEN) == replace(parse(QWEN_MTP, QWEN), norm_offset=0.0)
    with pytest.raises(CheckpointError, match=r"mrope_section \[1, 0, 0\] does not fit 2 pairs"):
        parse(QWEN_MTP, QWEN, rope_scaling={"rope_type": "default", "mrope_section": [1, 0, 0]})
    nested = {"text_config": QWEN, "hidden_size": 99}
    assert parse(QWEN_MTP, nested) == parse(QWEN_MTP, QWEN)


def test_mtp_of_speculators() -> None:
    assert parse(SPECULATORS_MTP, SPECULATORS_QWEN) == parse(QWEN_MTP, QWEN)
    routed = {"transformer_layer_config": QWEN_MOE}
    config = parse(SPECULATORS_MTP, SPECULATORS_QWEN, "mtp_layers.0.mlp.gate.weight", **routed)
    assert config == parse(QWEN_MTP, QWEN_MOE, "mtp.layers.0.mlp.gate.weight")


def test_eagle_3_of_deepspec() -> None:
    """The ids are of the layers whose outputs are read."""
    config = parse(DEEPSPEC_EAGLE3, DEEPSPEC, "layers.0.self_attn.q_norm.weight")
    check(
        config,
        head="eagle3",
        target_layer_ids=(0, 2, 4, 5, 7),
        qk_norm=True,
        normed_residual=False,
        normed_feedback=False,
        own_vocabulary=True,
    )
    assert mtp_shapes(config, 10)["fc.weight"] == (8, 40)


def test_eagle_3_of_deepspec_for_gemma_4() -> None:
    """Half of four pairs turn, with frequencies of the whole head."""
    config = parse(GEMMA4_EAGLE3, DEEPSPEC_GEMMA4)
    check(
        config,
        attention_scale=1.0,
        gemma4=True,
        head_dim=8,
        input_scale=8**0.5,
        keys_are_values=True,
        num_key_value_heads=2,
        qk_norm=True,
        softcap=30.0,
    )
    np.testing.assert_allclose(config.inv_freq, (1.0, 0.5, 0.0, 0.0))
    shapes = mtp_shapes(config, 10)
    assert "layer.self_attn.v_proj.weight" not in shapes
    assert shapes["layer.layer_scalar"] == (1,)
    plain = parse(GEMMA4_EAGLE3, DEEPSPEC_GEMMA4, attention_k_eq_v=False)
    check(plain, num_key_value_heads=1)
    assert mtp_shapes(plain, 10)["layer.self_attn.v_proj.weight"] == (8, 16)


def test_experts_of_qwen() -> None:
    expected = Experts(
        count=3, per_token=2, width=5, shared_width=6, shared_gate=True, sigmoid=False,
        normalised=True,
    )  # fmt: skip
    config = parse(QWEN_MTP, QWEN_MOE, "mtp.layers.0.mlp.gate.weight")
    check(config, experts=expected, intermediate_size=0)
    config = parse(QWEN_SIDECAR, QWEN_MOE, "layers.0.mlp.gate.weight", norm_topk_prob=False)
    check(config, experts=replace(expected, normalised=False))
    shapes = mtp_shapes(config, 10)
    assert shapes["layer.mlp.gate.weight"] == (3, 8)
    assert shapes["layer.mlp.shared_expert_gate.weight"] == (1, 8)
    assert shapes["layer.mlp.shared_expert.down_proj.weight"] == (8, 6)
    assert shapes["layer.mlp.experts.2.up_proj.weight"] == (5, 8)
    assert "layer.mlp.gate.correction.bias" not in shapes


def test_mtp_of_glm() -> None:
    expected = Experts(
        count=3, per_token=2, width=5, shared_width=10, shared_gate=False, sigmoid=True,
        normalised=True, scale=2.5,
    )  # fmt: skip
    config = parse(GLM_MTP, GLM, attention_bias=True, use_qk_norm=True)
    check(
        config,
        head="mtp",
        experts=expected,
        intermediate_size=0,
        qk_norm=True,
        gated=False,
        attention_bias=True,
        output_bias=False,
        norm_offset=0.0,
        num_target_layers=12,
        target_layer_ids=(12,),
        final_state=True,
        normed_feedback=True,
    )
    check(parse(GLM_MTP, GLM), qk_norm=False)
    shapes = mtp_shapes(config, 10)
    assert shapes["layer.mlp.gate.correction.bias"] == (3,)
    assert shapes["layer.mlp.shared_expert.up_proj.weight"] == (10, 8)
    assert "layer.mlp.shared_expert_gate.weight" not in shapes
    alone = parse(GLM_MTP, GLM, n_shared_experts=0, routed_scaling_factor=1.0)
    check(alone, experts=replace(expected, shared_width=0, scale=1.0))
    assert not [name for name in mtp_shapes(alone, 10) if "shared_expert" in name]


def test_latent_attention() -> None:
    config = parse(GLM_MTP, LATENT, n_routed_experts=4, n_group=2)
    check(config, head_dim=2, attention_scale=5**-0.5, inv_freq=(1.0,), column_size=6 + 2 + 8)
    assert config.experts is not None
    assert (config.experts.groups, config.experts.chosen_groups) == (2, 1)
    shapes = mtp_shapes(config, 10)
    assert shapes["layer.self_attn.q_a_proj.weight"] == (5, 8)
    assert shapes["layer.self_attn.q_b_proj.weight"] == (2 * 5, 5)
    assert shapes["layer.self_attn.kv_a_proj_with_mqa.weight"] == (8, 8)
    assert shapes["layer.self_attn.kv_b"] == (2 * 10, 6)
    assert shapes["layer.self_attn.o_proj.weight"] == (8, 14)
    plain = parse(GLM_MTP, LATENT, q_lora_rank=None)
    assert mtp_shapes(plain, 10)["layer.self_attn.q_b_proj.weight"] == (10, 8)
    prefix = "model.layers.12.self_attn."
    names = [f"{prefix}q_proj.weight", f"{prefix}kv_b_proj.weight"]
    named = GLM_MTP.names({**LATENT, "q_lora_rank": None}, names)
    assert list(named.values()) == ["layer.self_attn.q_b_proj.weight", "layer.self_attn.kv_b"]
    yarn = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    yarn |= {"original_max_position_embeddings": 64}
    stretched = parse(GLM_MTP, LATENT, rope_scaling=yarn)
    scale = (0.1 * np.log(40) + 1) ** 2 * 5**-0.5
    assert stretched.attention_scale == pytest.approx(scale)
    assert stretched.rope_scale == 1


def test_stacked_experts_of_mlx() -> None:
    """A side file has them under `switch_mlp`; each has the shape of a single expert."""
    name = "layers.0.mlp.switch_mlp.gate_proj.weight"
    canonical = QWEN_SIDECAR.names({}, [name])[name]
    assert canonical == "layer.mlp.experts.gate_proj"
    stacked = {canonical: (3, 5, 8), "layer.mlp.experts.down_proj": (3, 8, 5)}
    stacked["layer.mlp.experts.up_proj"] = (3, 5, 8)
    split = split_fused(stacked)
    assert split["layer.mlp.experts.2.gate_proj.weight"] == (5, 8)
    assert split["layer.mlp.experts.0.down_proj.weight"] == (8, 5)
    assert len(split) == 9
    tensors = {key: np.zeros(shape) for key, shape in stacked.items()}
    config = parse(QWEN_SIDECAR, QWEN_MOE, "layers.0.mlp.gate.weight")
    assert stack_experts(dict(tensors), config, np.stack).keys() == tensors.keys()


@pytest.mark.parametrize("form", ["eagle", "speculators"])
def test_dialects_of_eagle_3(form: str) -> None:
    format, base = (EAGLE3, EAGLE) if form == "eagle" else (SPECULATORS_EAGLE3, SPECULATORS)
    check(
        parse(format, base),
        head="eagle3",
        target_layer_ids=(1, 5, 8),
        num_target_layers=None,
        final_state=False,
        reads_both=True,
        normed_residual=False,
        normed_feedback=False,
        feature_norms=None,
        qk_norm=False,
        output_bias=False,
        own_vocabulary=True,
        draft_vocab_size=None,
    )
    for changes, expected in (
        ({"eagle_aux_hidden_state_layer_ids": [2, 5, 9]}, {"target_layer_ids": (1, 4, 8)}),
        ({"norm_before_residual": True}, {"normed_residual": True}),
        ({"norm_output": True}, {"normed_feedback": True}),
        ({"fc_norm": True}, {"feature_norms": "each"}),
        ({"use_aux_norm": True}, {"feature_norms": "each"}),
        ({"norm_before_fc": True}, {"feature_norms": "all"}),
        ({"draft_vocab_size": 7}, {"draft_vocab_size": 7}),
        ({"draft_vocab_size": 10}, {"draft_vocab_size": None}),
    ):
        check(parse(format, base, **changes), **expected)
        if form == "eagle" and "eagle_aux_hidden_state_layer_ids" not in changes:
            other, unset = dict.fromkeys(changes, False), dict.fromkeys(changes)
            check(parse(format, base, **other, eagle_config=changes), **expected)
            check(parse(format, base, **changes, eagle_config=unset), **expected)
    check(parse(format, base, "midlayer.self_attn.q_norm.weight"), qk_norm=True)
    with pytest.raises(ValueError, match="exclude each other"):
        parse(format, base, fc_norm=True, norm_before_fc=True)
    with pytest.raises(ValueError, match="num_aux_hidden_states = 2 contradicts 3"):
        parse(format, base, num_aux_hidden_states=2)
    with pytest.raises(ValueError, match="target_hidden_size unlike"):
        parse(format, base, target_hidden_size=16)
    for key in ("mystery", "use_mtp_layernorm", "mlp_bias"):
        with pytest.raises(ValueError, match=f"{key} = True is not supported"):
            parse(format, base, **{key: True})
        parse(format, base, **{key: False})
    for key in ("next_layer_regular", "use_aux_hidden_state", "use_last_layernorm"):
        with pytest.raises(ValueError, match=f"{key} = False is not supported"):
            parse(format, base, **{key: False})
        parse(format, base, **{key: True})


@pytest.mark.parametrize("form", ["eagle", "speculators"])
def test_the_window_of_eagle_3(form: str) -> None:
    def parsed(**changes: Any) -> MtpConfig:
        if form == "eagle":
            return parse(EAGLE3, EAGLE, **changes)
        layers = {**LAYER, "num_hidden_layers": 1, **changes}
        return parse(SPECULATORS_EAGLE3, SPECULATORS, transformer_layer_config=layers)

    unused = {"sliding_window": 4, "layer_types": ["full_attention"]}
    check(parsed(**unused), sliding_windows=(None,))
    check(parsed(**unused | {"layer_types": ["sliding_attention"]}), sliding_windows=(4,))
    with pytest.raises(ValueError, match="use_sliding_window without layer_types is not"):
        parsed(sliding_window=4, use_sliding_window=True)
    with pytest.raises(ValueError, match="layer type 'linear_attention' is not supported"):
        parsed(layer_types=["linear_attention"])


@pytest.mark.parametrize(
    ("format", "base"), [(SPECULATORS_EAGLE3, SPECULATORS), (PEAGLE, PARALLEL)]
)
def test_speculators_take_the_rotary_settings_of_sliding_layers(
    format: Format, base: dict[str, Any]
) -> None:
    by_type = {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 4.0},
    }
    layers = {**base["transformer_layer_config"], "rope_parameters": by_type}
    check(parse(format, base, transformer_layer_config=layers), inv_freq=(1.0, 0.5))


def test_p_eagle() -> None:
    config = parse(PEAGLE, PARALLEL, norm_before_residual=True)
    check(
        config,
        head=None,
        has_marginals=True,
        depths=6,
        scratch_rows=6,
        mask_token_id=9,
        num_hidden_layers=3,
        target_layer_ids=(1, 4),
        normed_residual=True,
        column_size=2 * 3 * 4 + 8,
    )
    shapes = mtp_shapes(config, 10)
    assert shapes["mask_hidden"] == (1, 1, 16)
    assert shapes["layer.self_attn.q_proj.weight"] == (8, 16)
    assert shapes["further_layers.1.self_attn.q_proj.weight"] == (8, 8)
    required, _ = PEAGLE.shapes(config, 10, {})
    assert required["embed_tokens.weight"] == (10, 8)
    sliding = {**PARALLEL["transformer_layer_config"], "sliding_window": 4}
    sliding["layer_types"] = ["full_attention"] * 2 + ["sliding_attention"]
    with pytest.raises(ValueError, match="P-EAGLE with a sliding window is not supported"):
        parse(PEAGLE, PARALLEL, transformer_layer_config=sliding)
    with pytest.raises(KeyError, match="mask_token_id"):
        parse(PEAGLE, {key: x for key, x in PARALLEL.items() if key != "mask_token_id"})
    with pytest.raises(ValueError, match="speculators_config has no proposal_methods"):
        parse(PEAGLE, PARALLEL, speculators_config={"proposal_methods": []})
    training = {"num_depths": 8, "down_sample_ratio": 0.7, "down_sample_ratio_min": 0.2}
    assert parse(PEAGLE, PARALLEL, **training) == parse(PEAGLE, PARALLEL), "version 0.6"


def test_layer_ids_and_biases_of_eagle_3() -> None:
    """ModelOpt's ids are of outputs; the others are of the layers that read them."""
    nested = {"eagle_aux_hidden_state_layer_ids": [2, 5, 9], "use_aux_hidden_state": True}
    check(parse(EAGLE3, EAGLE, eagle_config=nested), target_layer_ids=(2, 5, 9))
    with pytest.raises(ValueError, match="mystery = 1 is not supported"):
        parse(EAGLE3, EAGLE, eagle_config={"mystery": 1})
    plain = parse(EAGLE3, EAGLE, eagle_aux_hidden_state_layer_ids=[3, 6, 10])
    nested |= {"parallel_draft_step": 1, "parallel_draft_heads_num_layers": 1}
    copied = {"target_model_type": "qwen3_moe", "decoder_sparse_step": 1, "image_token_id": 7}
    assert parse(EAGLE3, EAGLE, eagle_config=nested, **copied) == plain
    biased = parse(EAGLE3, EAGLE, attention_bias=True, parallel_draft_step=1)
    check(biased, attention_bias=True, output_bias=True)
    shapes = mtp_shapes(biased, 10)
    assert [shapes[f"layer.self_attn.{name}_proj.bias"] for name in "qkvo"] == [
        *((8,), (4,), (4,), (8,))
    ]
    assert shapes["layer.self_attn.q_proj.weight"] == (8, 16), "it reads embedding and state"
    assert shapes["fc.weight"] == (8, 24)
    assert mtp_shapes(parse(EAGLE3, EAGLE, norm_before_fc=True), 10)["input_norm.weight"] == (24,)
    assert mtp_shapes(parse(EAGLE3, EAGLE, fc_norm=True), 10)["fc_norm.2.weight"] == (8,)
    own = mtp_shapes(parse(EAGLE3, EAGLE, draft_vocab_size=7), 10)
    assert (own["d2t"], own["lm_head.weight"], own["embed_tokens.weight"]) == (
        *((7,), (7, 8), (10, 8)),
    )


def test_assistants_of_gemma() -> None:
    config = parse(ASSISTANT, GEMMA)
    check(
        config,
        head="assistant",
        depths=8,
        hidden_size=16,
        vocab_size=10,
        num_hidden_layers=0,
        final_state=True,
        own_vocabulary=True,
        scratch_rows=0,
        column_size=16,
        assistant=Assistant(settings=ASSISTANT_LAYERS),
    )
    shapes = mtp_shapes(config, 10)
    assert shapes["pre_projection.weight"] == (8, 32)
    assert shapes["post_projection.weight"] == (16, 8)
    assert shapes["layers.0.self_attn.q_proj.weight"] == (8, 8)
    assert shapes["layers.1.self_attn.q_proj.weight"] == (12, 8)
    assert shapes["layers.1.self_attn.q_norm.weight"] == (6,)
    clusters = {"use_ordered_embeddings": True, "num_centroids": 5}
    clustered = parse(ASSISTANT, GEMMA, centroid_intermediate_top_k=5, **clusters)
    check(clustered, assistant=Assistant(settings=ASSISTANT_LAYERS, clusters=5, scored=5))
    shapes = mtp_shapes(clustered, 10)
    assert shapes["masked_embedding.centroids.weight"] == (5, 8)
    assert shapes["masked_embedding.token_ordering"] == (10,)
    for count, scored in ((5, 6), (5, 0), (4, 2)):
        wrong = {**clusters, "num_centroids": count, "centroid_intermediate_top_k": scored}
        with pytest.raises(ValueError, match=f"{scored} of {count} clusters of 10 tokens"):
            parse(ASSISTANT, GEMMA, **wrong)
    for changes in (
        {"mystery": 1},
        {"hidden_activation": "silu"},
        {"hidden_size_per_layer_input": 1},
        {"attention_bias": True},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention", "chunked_attention"]},
    ):
        (key,) = changes
        with pytest.raises(ValueError, match=f"{key} = .* is not supported"):
            parse(ASSISTANT, GEMMA, text_config={**ASSISTANT_LAYERS, **changes})
    with pytest.raises(ValueError, match="mystery = 1 is not supported"):
        parse(ASSISTANT, GEMMA, mystery=1)


@pytest.mark.parametrize(
    ("format", "config", "key", "value"),
    [
        (QWEN_MTP, QWEN, "mtp_num_hidden_layers", 2),
        (QWEN_MTP, QWEN, "mtp_use_dedicated_embeddings", True),
        (QWEN_MTP, QWEN, "hidden_act", "gelu"),
        (GLM_MTP, GLM, "num_nextn_predict_layers", 2),
        (GLM_MTP, GLM, "n_group", 2),
        (GLM_MTP, GLM, "topk_group", 2),
        (GLM_MTP, GLM, "mtp_share", True),
        (SPECULATORS_MTP, SPECULATORS_QWEN, "num_nextn_predict_layers", 2),
        (SPECULATORS_MTP, SPECULATORS_QWEN, "mystery", 1),
        (DEEPSPEC_EAGLE3, DEEPSPEC, "draft_num_hidden_layers", 2),
        (DEEPSPEC_EAGLE3, DEEPSPEC, "mystery", 1),
        (EAGLE3, EAGLE, "parallel_draft_step", 4),
        (EAGLE3, EAGLE, "hidden_act", "gelu"),
        (EAGLE3, EAGLE, "num_hidden_layers", 2),
        (GEMMA4_EAGLE3, DEEPSPEC_GEMMA4, "mystery", 1),
        (GEMMA4_EAGLE3, DEEPSPEC_GEMMA4, "enable_moe_block", True),
        (GEMMA4_EAGLE3, DEEPSPEC_GEMMA4, "num_kv_shared_layers", 2),
    ],
)
def test_settings_of_mtp_heads_that_nothing_reads_are_refused(
    format: Format, config: dict[str, Any], key: str, value: object
) -> None:
    with pytest.raises(ValueError, match=f"{key} = {value!r} is not supported"):
        parse(format, config, **{key: value})


@pytest.mark.parametrize(
    ("format", "config", "names"),
    [
        (
            QWEN_MTP,
            QWEN,
            {
                "mtp.fc.weight": "input_proj.weight",
                "mtp.pre_fc_norm_embedding.weight": "embedding_norm.weight",
                "mtp.pre_fc_norm_hidden.weight": "hidden_norm.weight",
                "mtp.norm.weight": "norm.weight",
                "mtp.layers.0.self_attn.q_proj.weight": "layer.self_attn.q_proj.weight",
                "model.layers.0.self_attn.q_proj.weight": None,
            },
        ),
        (
            QWEN_SIDECAR,
            QWEN,
            {"fc.weight": "input_proj.weight", "layers.0.mlp.x": "layer.mlp.x"},
        ),
        (
            GLM_MTP,
            GLM,
            {
                "model.layers.12.enorm.weight": "embedding_norm.weight",
                "model.layers.12.hnorm.weight": "hidden_norm.weight",
                "model.layers.12.eh_proj.weight": "input_proj.weight",
                "model.layers.12.shared_head.norm.weight": "norm.weight",
                "model.layers.12.mlp.shared_experts.x": "layer.mlp.shared_expert.x",
                "model.layers.12.mlp.gate.x": "layer.mlp.gate.x",
                "model.layers.12.shared_head.head.weight": None,
                "model.layers.12.embed_tokens.weight": None,
                "model.layers.11.mlp.up_proj.weight": None,
            },
        ),
        (
            EAGLE3,
            EAGLE,
            {
                "midlayer.hidden_norm.weight": "hidden_norm.weight",
                "midlayer.input_layernorm.weight": "embedding_norm.weight",
                "midlayer.self_attn.q_proj.bias": "layer.self_attn.q_proj.bias",
                "model.norm.weight": "norm.weight",
                "fc.weight": "fc.weight",
                "t2d": None,
                "d2t": None,
                "verifier_norm.weight": None,
            },
        ),
        (
            SPECULATORS_EAGLE3,
            {**SPECULATORS, "draft_vocab_size": 7},
            {
                "layers.0.hidden_norm.weight": "hidden_norm.weight",
                "layers.0.mlp.up_proj.weight": "layer.mlp.up_proj.weight",
                "d2t": "d2t",
                "t2d": None,
            },
        ),
        (
            SPECULATORS_MTP,
            SPECULATORS_QWEN,
            {
                "mtp_layers.0.token_layernorm.weight": "embedding_norm.weight",
                "mtp_layers.0.hidden_layernorm.weight": "hidden_norm.weight",
                "mtp_layers.0.input_proj.weight": "input_proj.weight",
                "mtp_layers.0.final_layernorm.weight": "norm.weight",
                "mtp_layers.0.input_layernorm.weight": "layer.input_layernorm.weight",
                "mtp_layers.0.mlp.experts.down_proj": "layer.mlp.experts.down_proj",
            },
        ),
        (
            ASSISTANT,
            GEMMA,
            {
                "model.layers.1.layer_scalar": "layers.1.layer_scalar",
                "model.embed_tokens.weight": "lm_head.weight",
                "lm_head.weight": None,
                "pre_projection.weight": "pre_projection.weight",
            },
        ),
    ],
)  # fmt: skip
def test_names_of_tensors(
    format: Format, config: dict[str, Any], names: dict[str, str | None]
) -> None:
    expected = {stored: name for stored, name in names.items() if name is not None}
    assert format.names(config, names) == expected


def write_eagle(folder: Path, **changes: Any) -> dict[str, Any]:
    """A head without its embeddings and output head, which it shares with the target."""
    config = {**EAGLE, **changes}
    optional = ("embed_tokens.weight", "lm_head.weight")
    stored = {
        name: np.zeros(shape, np.float32)
        for name, shape in mtp_shapes(EAGLE3.parse(config, (), 12), 10).items()
        if name not in optional
    }
    save(folder, config, stored)
    return {"config": config, "stored": stored}


def load(folder: Path, **changes: int) -> Any:
    target = {"hidden_size": 8, "vocab_size": 10, "num_hidden_layers": 12, **changes}
    layout = read_layout(folder, **target)
    weights, vocabulary = mtp_tensors(layout, read_file, read_quantised, np.stack)
    return SimpleNamespace(config=layout.config, weights=weights, vocabulary=vocabulary)


def test_a_head_fits_its_target(tmp_path: Path) -> None:
    write_eagle(tmp_path / "head")
    found = load(tmp_path / "head")
    assert not found.vocabulary
    assert found.weights.keys() == mtp_shapes(found.config, 10).keys() - {
        "embed_tokens.weight",
        "lm_head.weight",
    }
    for changes, problem in (
        ({"hidden_size": 16}, "its hidden size is 8, the target's is 16"),
        ({"vocab_size": 11}, "its vocabulary has 10 tokens, the target's has 11"),
        ({"num_hidden_layers": 2}, r"it reads target layers \[1, 0, -2\], the target has 2"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            load(tmp_path / "head", **changes)
    mtp = {"num_hidden_layers": 11}
    write_eagle(tmp_path / "embeddings", eagle_aux_hidden_state_layer_ids=[0, 5, 9])
    assert load(tmp_path / "embeddings").config.target_layer_ids == (-1, 4, 8)
    save(tmp_path / "mtp", QWEN, tensors("mtp.fc.weight", "mtp.pre_fc_norm_hidden.weight"))
    with pytest.raises(CheckpointError, match="a target of 12 layers, this one has 11"):
        load(tmp_path / "mtp", **mtp)


def test_tensors_of_a_head_are_checked(tmp_path: Path) -> None:
    folder = tmp_path / "head"
    parts = write_eagle(folder)

    def refused(problem: str, remove: str | None = None, **changes: Any) -> None:
        stored = {k: x for k, x in (parts["stored"] | changes).items() if k != remove}
        save(folder, parts["config"], stored)
        with pytest.raises(CheckpointError, match=re.escape(problem)):
            load(folder)

    zeros = np.zeros((2, 2), np.float32)
    refused("lacks the tensor norm.weight of shape (8,)", remove="norm.weight")
    wrong = "tensor fc.weight has shape (2, 2), config.json asks for (8, 24)"
    refused(wrong, **{"fc.weight": zeros})
    refused("an unexpected tensor for an MTP or EAGLE-3 head: extra", extra=zeros)
    refused("tensors of type I8", **{"fc.weight": np.zeros((8, 24), np.int8)})
    packed = {"quantization": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}
    words = {"fc.weight": np.zeros((8, 2), np.uint32)} | tensors("pre_fc_norm_hidden.weight")
    save(folder, {**QWEN, **packed, "model_type": "qwen3_5_mtp"}, words)
    with pytest.raises(CheckpointError, match="mode 'nvfp4'; the mode 'affine' is supported"):
        load(folder)
    save(folder, {k: x for k, x in EAGLE.items() if k != "vocab_size"}, parts["stored"])
    with pytest.raises(CheckpointError, match=r"config\.json lacks 'vocab_size'"):
        load(folder)
    save(folder, {**EAGLE, "hidden_size": "wide"}, parts["stored"])
    with pytest.raises(CheckpointError, match=r"config\.json is not valid: "):
        load(folder)
    own = write_eagle(folder, draft_vocab_size=7)
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        load(folder)
    head = {"lm_head.weight": np.ones((7, 8), np.float32)}
    save(folder, own["config"], own["stored"] | {"d2t": np.zeros(7, np.int64)} | head)
    assert load(folder).vocabulary.keys() == {"lm_head.weight", "d2t"}


@pytest.mark.parametrize("fused", [False, True])
def test_experts_are_stacked(tmp_path: Path, fused: bool) -> None:
    """They may be stored together, gates before the others."""
    rng = np.random.default_rng(0)
    names = ("mtp.layers.0.mlp.gate.weight",)
    shapes = mtp_shapes(QWEN_MTP.parse(QWEN_MOE, names, 12), 10)
    renamed = {"input_proj": "fc", "hidden_norm": "pre_fc_norm_hidden"}
    renamed |= {"embedding_norm": "pre_fc_norm_embedding", "layer": "layers.0"}
    stored = {}
    for name, shape in shapes.items():
        first, _, rest = name.partition(".")
        stored[f"mtp.{renamed.get(first, first)}.{rest}"] = rng.normal(size=shape).astype("f4")
    prefix, parts = "mtp.layers.0.mlp.experts.", ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (
        np.stack([stored[f"{prefix}{i}.{name}.weight"] for i in range(3)]) for name in parts
    )
    if fused:
        stored = {name: x for name, x in stored.items() if not name.startswith(prefix)}
        stored |= {f"{prefix}gate_up_proj": np.concatenate([gate, up], 1)}
        stored |= {f"{prefix}down_proj": down}
    save(tmp_path / "head", QWEN_MOE, stored)
    weights = load(tmp_path / "head").weights
    for name, expected in zip(parts, (gate, up, down), strict=True):
        np.testing.assert_array_equal(weights[f"layer.mlp.experts.{name}"], expected)
    assert not [name for name in weights if name.startswith("layer.mlp.experts.0")]


def test_what_only_some_backends_and_drafters_have() -> None:
    mtp_heads.refuse_window(LoadConfig())
    with pytest.raises(ConfigError, match="draft_window is not supported"):
        mtp_heads.refuse_window(LoadConfig(draft_window=8))
    mtp_heads.refuse_missing_targets(parse(QWEN_MTP, QWEN), "reference")
    with pytest.raises(UnsupportedModelError, match="by the reference backend; use the mlx"):
        mtp_heads.refuse_missing_targets(parse(ASSISTANT, GEMMA), "reference")
    with pytest.raises(
        UnsupportedModelError, match="latent attention is not supported by the cuda"
    ):
        mtp_heads.refuse_missing_targets(parse(GLM_MTP, LATENT), "cuda")
