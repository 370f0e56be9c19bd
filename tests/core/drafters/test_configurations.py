"""Each way to write a setting of a configuration, and each invalid one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treeflash.drafters.backbone import default_target_layer_ids
from treeflash.drafters.formats import TREEFLASH_HEADS, drafter_config
from treeflash.errors import CheckpointError
from treeflash.testing.models import edit_config

Config = dict[str, Any]
Edit = Callable[[Config], object]


def message(text: str) -> str:
    """A pattern that matches the whole message and nothing else."""
    return f"^{re.escape(text)}$"


class TestConfig:
    def test_treeflash(self, folder: Path) -> None:
        config = drafter_config(folder)
        assert config.head == "swiglu"
        assert (config.hidden_size, config.intermediate_size) == (32, 64)
        assert config.num_hidden_layers == 2
        assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
        assert config.head_dim == 8
        assert config.rms_norm_eps == 1e-6
        assert not config.attention_bias
        assert config.block_size == 6
        assert config.mask_token_id == 23
        assert config.target_layer_ids == (0, 2)
        assert config.num_target_layers == 4
        assert config.vocab_size == 24
        assert config.inv_freq == pytest.approx([1000 ** -(i / 4) for i in range(4)])
        assert config.rope_scale == 1
        assert config.sliding_windows == (None, None)
        assert config.causal == (False, False)
        assert config.input_scale == 1

    def test_dflash_is_the_same_without_a_head(self, folder: Path, dflash_folder: Path) -> None:
        assert drafter_config(dflash_folder) == replace(drafter_config(folder), head=None)

    def test_a_linear_head_is_named(self, folder: Path, linear_folder: Path) -> None:
        assert drafter_config(linear_folder) == replace(drafter_config(folder), head="linear")

    @pytest.mark.parametrize(
        "spell",
        [
            lambda c: c["dflash_config"].update(block_size=c.pop("block_size")),
            lambda c: c["dflash_config"].update(num_target_layers=c.pop("num_target_layers")),
            lambda c: c.update(c.pop("dflash_config")),
            lambda c: c.update(c.pop("treeflash_config")),
            lambda c: c["treeflash_config"].update(c.pop("dflash_config")),
            lambda c: c.pop("rope_theta"),
            lambda c: c.pop("rope_parameters"),
            lambda c: c.update(layer_types=["full_attention", "full_attention"]),
            lambda c: c.update(sliding_window=None, use_sliding_window=False),
            lambda c: c.pop("attention_bias"),
            lambda c: c.update(output_multiplier=1.0, final_logit_softcapping=None),
            lambda c: c["dflash_config"].update(
                hidden_size=c["hidden_size"], num_anchors=64, use_swa=False, logit_temperature=None
            ),
        ],
        ids=[
            "block size inside",
            "target's depth inside",
            "dflash keys at top level",
            "head at top level",
            "all in treeflash_config",
            "rope_parameters only",
            "rope_theta only",
            "layer types",
            "sliding window off",
            "no attention_bias",
            "neutral scaling",
            "keys that mean nothing",
        ],
    )
    def test_both_forms_mean_the_same(self, folder: Path, spell: Edit) -> None:
        expected = drafter_config(folder)
        edit_config(folder, spell)
        assert drafter_config(folder) == expected

    @pytest.mark.parametrize(
        ("edit", "field", "value"),
        [
            (lambda c: c.update(head_dim=None), "head_dim", 8),
            (lambda c: c.update(head_dim=16), "head_dim", 16),
            (lambda c: c.pop("num_key_value_heads"), "num_key_value_heads", 4),
            (lambda c: c.pop("block_size"), "block_size", 16),
            (lambda c: c.pop("vocab_size"), "vocab_size", None),
            (lambda c: c.pop("num_target_layers"), "num_target_layers", None),
            (lambda c: c.update(attention_bias=True), "attention_bias", True),
            (lambda c: c.update(input_embedding_scale=2.5), "input_scale", 2.5),
            (lambda c: c["dflash_config"].update(output_multiplier=0.5), "output_multiplier", 0.5),
            (lambda c: c.update(final_logit_softcapping=30.0), "softcap", 30.0),
            (lambda c: c.update(final_logit_softcapping=0), "softcap", None),
            (lambda c: c["dflash_config"].update(causal=True), "causal", (True, True)),
            (lambda c: c["treeflash_config"].update(ar_approximation=None), "head", None),
            (lambda c: c.pop("treeflash_config"), "head", None),
            (lambda c: c["dflash_config"].update(mask_token_id=0), "mask_token_id", 0),
            # Inside wins over the top level: that is where newer files say it.
            (lambda c: c["dflash_config"].update(block_size=4), "block_size", 4),
            (lambda c: c["dflash_config"].pop("target_layer_ids"), "target_layer_ids", (1, 1)),
        ],
    )
    def test_setting(self, folder: Path, edit: Edit, field: str, value: object) -> None:
        edit_config(folder, edit)
        assert getattr(drafter_config(folder), field) == value

    def test_sliding_layers(self, folder: Path) -> None:
        """They are causal unless the file says otherwise, as in the published code."""
        sliding = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
        edit_config(folder, lambda c: c.update(sliding))
        config = drafter_config(folder)
        assert config.sliding_windows == (7, None)
        assert config.causal == (True, False)
        edit_config(folder, lambda c: c.update(is_causal=False))
        assert drafter_config(folder).causal == (False, False)
        edit_config(folder, lambda c: c.update(is_causal=True))
        assert drafter_config(folder).causal == (True, True)

    @pytest.mark.parametrize("name", ["is_causal", "causal", "causal_head"])
    @pytest.mark.parametrize("causal", [True, False])
    def test_each_name_of_a_causal_block(self, folder: Path, name: str, causal: bool) -> None:
        """z-lab, vLLM and NeMo, and JetSpec name it differently; a null means that it is absent."""
        sliding = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
        edit_config(folder, lambda c: c.update(sliding))
        edit_config(folder, lambda c: c["dflash_config"].update({"is_causal": None, name: causal}))
        assert drafter_config(folder).causal == (causal, causal)

    def test_a_window_without_sliding_layers_is_none(self, folder: Path) -> None:
        edit_config(folder, lambda c: c.update(sliding_window=7))
        assert drafter_config(folder).sliding_windows == (None, None)

    def test_yarn(self, folder: Path) -> None:
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
        edit_config(folder, lambda c: c.update(rope_parameters={**rope, "rope_theta": 1000.0}))
        assert drafter_config(folder).rope_scale == pytest.approx(0.1 * np.log(4) + 1)

    @pytest.mark.parametrize(
        ("target_layers", "layers", "ids"),
        [
            (36, 5, (1, 9, 17, 25, 33)),  # Qwen3-4B and Qwen3-8B
            (48, 8, (1, 7, 14, 20, 26, 32, 39, 45)),
            (30, 3, (1, 14, 27)),
            (36, 1, (18,)),
            (7, 1, (3,)),
            (5, 2, (1, 2)),
            # The eighth is exactly 31.5, which `round` makes even.
            (65, 15, (1, 5, 10, 14, 18, 23, 27, 32, 36, 40, 45, 49, 53, 58, 62)),
        ],
    )
    def test_default_target_layer_ids(
        self, target_layers: int, layers: int, ids: tuple[int, ...]
    ) -> None:
        assert default_target_layer_ids(target_layers, layers) == ids


class TestBadConfigs:
    @pytest.mark.parametrize(
        "key",
        [
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "rms_norm_eps",
        ],
    )
    def test_missing_key(self, folder: Path, key: str) -> None:
        edit_config(folder, lambda c: c.pop(key))
        expected = f"{folder / 'config.json'} lacks '{key}'; is it a DFlash or TreeFlash drafter?"
        with pytest.raises(CheckpointError, match=message(expected)):
            drafter_config(folder)

    def test_missing_mask_token(self, folder: Path) -> None:
        edit_config(folder, lambda c: c.pop("dflash_config"))
        edit_config(folder, lambda c: c.update(target_layer_ids=[0, 2]))
        with pytest.raises(CheckpointError, match=r"config\.json lacks 'mask_token_id'; is it a"):
            drafter_config(folder)

    def test_layer_ids_cannot_be_guessed_without_the_targets_depth(self, folder: Path) -> None:
        edit_config(folder, lambda c: c["dflash_config"].pop("target_layer_ids"))
        edit_config(folder, lambda c: c.pop("num_target_layers"))
        with pytest.raises(CheckpointError, match=r"config\.json lacks 'num_target_layers'"):
            drafter_config(folder)

    @pytest.mark.parametrize(
        ("edit", "problem"),
        [
            (lambda c: c.update(block_size=1), "block_size must be 2 or more, got 1"),
            (lambda c: c.update(block_size=5000), "block_size must be at most 4096, got 5000"),
            (
                lambda c: c["treeflash_config"].update(ar_approximation="bilinear"),
                f"unknown AR head 'bilinear'; known heads are {', '.join(TREEFLASH_HEADS)}",
            ),
            (
                lambda c: c.update(layer_types=["full_attention"]),
                "layer_types lists 1 layers, num_hidden_layers is 2",
            ),
            (
                lambda c: c.update(layer_types=["full_attention", "chunked_attention"]),
                "layer type 'chunked_attention' is not supported; known types are "
                "full_attention, sliding_attention",
            ),
            (
                lambda c: c.update(attention_value_scale=0.7),
                "attention_value_scale = 0.7 is not supported",
            ),
            (lambda c: c.update(hidden_act="gelu"), "hidden_act = 'gelu' is not supported"),
            (lambda c: c.update(markov_rank=256), "markov_rank = 256 is not supported"),
            (
                lambda c: c["dflash_config"].update(projector_type="hydra"),
                "projector_type = 'hydra' is not supported",
            ),
            (
                lambda c: c.update(architectures=["K3DSparkModel"]),
                "the layout K3DSparkModel (DSpark for Kimi K3) is not supported",
            ),
            (
                lambda c: c["dflash_config"].update(logit_temperature=0.5),
                "dflash_config.logit_temperature = 0.5 is not supported; remove it if it does not "
                "change the drafter's output",
            ),
            (
                lambda c: c["dflash_config"].update(swa_window_size=8),
                "dflash_config.swa_window_size = 8 contradicts sliding_window = None at the top "
                "level",
            ),
            (
                lambda c: c["dflash_config"].update(target_hidden_size=64),
                "a target_hidden_size unlike the drafter's hidden_size is not supported",
            ),
            (
                lambda c: c.update(dspark_block_size=5),
                "the layout of DeepSeek-V4's DSpark is not supported",
            ),
            *(
                (
                    lambda c, window=window: c.update(
                        layer_types=["sliding_attention"] * 2, sliding_window=window
                    ),
                    f"sliding_window must be 1 or more for sliding layers, got {window!r}",
                )
                for window in (None, 0, -1, True, "4")
            ),
            (
                lambda c: c["dflash_config"].update(use_swa=True, swa_window_size=0),
                "sliding_window must be 1 or more for sliding layers, got 0",
            ),
            *(
                (
                    lambda c, kind=kind: c.update(
                        speculators_model_type=kind, transformer_layer_config={}
                    ),
                    f"speculators of type {kind!r} are not supported; supported are dflash, "
                    "dflash2, dspark",
                )
                for kind in ("eagle3", "mtp")
            ),
        ],
    )
    def test_value_that_is_not_supported(self, folder: Path, edit: Edit, problem: str) -> None:
        edit_config(folder, edit)
        expected = f"{folder / 'config.json'} is not valid: {problem}"
        with pytest.raises(CheckpointError, match=message(expected)):
            drafter_config(folder)

    @pytest.mark.parametrize(
        "edit",
        [
            lambda c: c.update(hidden_size="wide"),
            lambda c: c.update(hidden_size=None),
            lambda c: c.update(num_attention_heads=0, head_dim=None),
            lambda c: c.update(dflash_config=3),
            lambda c: c["dflash_config"].update(target_layer_ids=3),
            lambda c: c["dflash_config"].update(mask_token_id=[1]),
            lambda c: c.update(layer_types=["sliding_attention"] * 2, sliding_window=None),
        ],
    )
    def test_value_of_a_wrong_type(self, folder: Path, edit: Edit) -> None:
        edit_config(folder, edit)
        with pytest.raises(CheckpointError, match=r"config\.json is not valid: "):
            drafter_config(folder)

    def test_unknown_rope_type(self, folder: Path) -> None:
        edit_config(folder, lambda c: c.update(rope_parameters={"rope_type": "spiral"}))
        with pytest.raises(CheckpointError, match="rope type 'spiral' is not supported"):
            drafter_config(folder)
