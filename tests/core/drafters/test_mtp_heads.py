"""The formats of heads that draft depth by depth: how they are told apart, and what they say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mtp_configurations import (
    ASSISTANT_LAYERS,
    DEEPSPEC,
    DEEPSPEC_GEMMA4,
    EAGLE,
    GEMMA,
    GLM,
    LATENT,
    LAYER,
    MTP_NAMES,
    PARALLEL,
    QWEN,
    QWEN_MOE,
    SPECULATORS,
    SPECULATORS_QWEN,
    tensors,
)

from treeflash.config import LoadConfig
from treeflash.drafters import mtp_heads
from treeflash.drafters.folder import open_folder
from treeflash.drafters.format import Format
from treeflash.drafters.loading import find_head_format
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
from treeflash.drafters.mtp_tensors import mtp_shapes
from treeflash.errors import CheckpointError, ConfigError, UnsupportedModelError
from treeflash.testing.models import save


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
