"""Drafters and targets that fit each other, and each reason why they do not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mtp_pairs import write_mtp_pair

from treeflash.drafters.folder import read_config, read_file, read_tensors
from treeflash.drafters.formats import canonical_name, drafter_shapes, head_inner_size
from treeflash.drafters.loading import (
    check_drafter,
    check_pair,
    check_shapes,
    drafter_config,
    load_tensors,
    read_layout,
    refuse_extensions,
)
from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash.testing.models import save

TARGET_SHAPE = {"hidden_size": 32, "vocab_size": 24, "num_hidden_layers": 4}


def message(text: str) -> str:
    """A pattern that matches the whole message and nothing else."""
    return f"^{re.escape(text)}$"


class TestPairs:
    def test_a_pair_that_fits(self, folder):
        check_pair(drafter_config(folder), **TARGET_SHAPE)

    def test_what_a_drafter_does_not_state_is_not_checked(self, folder):
        config = replace(drafter_config(folder), vocab_size=None, num_target_layers=None)
        check_pair(config, hidden_size=32, vocab_size=50, num_hidden_layers=9)

    def test_a_target_with_sizes_of_other_names_is_not_checked(self, folder):
        assert check_drafter(folder, TARGET_SHAPE) == drafter_config(folder)
        assert check_drafter(folder, {"n_embd": 32, "vocab_size": 24, "n_layer": 4}) is None

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"hidden_size": 64}, "its hidden size is 64, the target's is 32"),
            ({"vocab_size": 25}, "its vocabulary has 25 tokens, the target's has 24"),
            ({"mask_token_id": 24}, "its mask token 24 is outside the vocabulary of 24"),
            ({"mask_token_id": -1}, "its mask token -1 is outside the vocabulary of 24"),
            ({"num_target_layers": 5}, "it was trained for a target of 5 layers, this one has 4"),
            ({"target_layer_ids": (0, 4)}, "it reads target layers [0, 4], the target has 4"),
            ({"target_layer_ids": (-2, 2)}, "it reads target layers [-2, 2], the target has 4"),
        ],
        ids=str,
    )
    def test_a_pair_that_does_not_fit(self, folder, change, problem):
        config = replace(drafter_config(folder), **change)
        with pytest.raises(
            CheckpointError, match=message(f"drafter and target do not fit: {problem}")
        ):
            check_pair(config, **TARGET_SHAPE)


class TestTensors:
    def shapes(self, folder: Path) -> dict[str, tuple[int, ...]]:
        return {canonical_name(name): t.shape for name, t in read_tensors(folder).items()}

    def test_canonical_name(self):
        assert canonical_name("model.fc.weight") == "fc.weight"
        assert canonical_name("fc.weight") == "fc.weight"

    def test_both_formats_have_the_tensors_of_their_configs(
        self, folder, dflash_folder, linear_folder
    ):
        for each, head_tensors in ((folder, 4), (linear_folder, 2), (dflash_folder, 0)):
            config, shapes = drafter_config(each), self.shapes(each)
            check_shapes(each, config, shapes)
            assert shapes == drafter_shapes(config, head_size=32)
            assert sum("ar_approximation" in name for name in shapes) == head_tensors

    def test_shapes_by_hand(self, folder):
        config = replace(drafter_config(folder), attention_bias=True, head_dim=16)
        shapes = drafter_shapes(config, head_size=5)
        assert shapes["fc.weight"] == (32, 64)
        assert shapes["layers.1.self_attn.q_proj.weight"] == (64, 32)
        assert shapes["layers.1.self_attn.q_proj.bias"] == (64,)
        assert shapes["layers.1.self_attn.v_proj.weight"] == (32, 32)
        assert shapes["layers.1.self_attn.v_proj.bias"] == (32,)
        assert shapes["layers.1.self_attn.o_proj.weight"] == (32, 64)
        assert shapes["layers.1.self_attn.o_proj.bias"] == (32,)
        assert shapes["layers.1.self_attn.k_norm.weight"] == (16,)
        assert shapes["layers.1.mlp.down_proj.weight"] == (32, 64)
        assert shapes["ar_approximation.ug.weight"] == (10, 64)
        assert shapes["ar_approximation.ug.bias"] == (10,)
        assert shapes["ar_approximation.d.weight"] == (32, 5)
        assert len(shapes) == 3 + 2 * 15 + 4

    def test_shapes_of_a_linear_head_by_hand(self, folder):
        shapes = drafter_shapes(replace(drafter_config(folder), head="linear"))
        assert shapes["ar_approximation.d.weight"] == (32, 64)
        assert shapes["ar_approximation.norm.weight"] == (32,)
        assert "ar_approximation.ug.weight" not in shapes

    @pytest.mark.parametrize("missing", ["ug.bias", "d.weight"])
    def test_either_tensor_gives_the_width_of_a_head(self, folder, missing):
        shapes = drafter_shapes(drafter_config(folder), head_size=5)
        del shapes[f"ar_approximation.{missing}"]
        assert head_inner_size(shapes) == 5

    def test_every_missing_tensor_is_named(self, folder):
        config, shapes = drafter_config(folder), self.shapes(folder)
        for name, shape in shapes.items():
            rest = {other: shapes[other] for other in shapes if other != name}
            expected = f"{folder} lacks the tensor {name} of shape {shape}"
            with pytest.raises(CheckpointError, match=message(expected)):
                check_shapes(folder, config, rest)

    def test_a_head_that_is_missing_altogether(self, folder, dflash_folder):
        with pytest.raises(CheckpointError, match=r"lacks the tensor ar_approximation\."):
            check_shapes(folder, drafter_config(folder), self.shapes(dflash_folder))

    @pytest.mark.parametrize(
        "name", ["fc.weight", "layers.0.self_attn.k_norm.weight", "ar_approximation.ug.weight"]
    )
    def test_misshapen_tensor_is_named(self, folder, name):
        shapes = self.shapes(folder)
        expected = f"{folder}: tensor {name} has shape (3, 5), config.json asks for {shapes[name]}"
        with pytest.raises(CheckpointError, match=message(expected)):
            check_shapes(folder, drafter_config(folder), shapes | {name: (3, 5)})

    def test_unexpected_tensor_is_named(self, folder):
        shapes = self.shapes(folder) | {"layers.2.mlp.up_proj.weight": (64, 32), "z": (1,)}
        expected = (
            f"{folder} holds an unexpected tensor for its configuration: "
            "layers.2.mlp.up_proj.weight"
        )
        with pytest.raises(CheckpointError, match=message(expected)):
            check_shapes(folder, drafter_config(folder), shapes)

    def test_a_head_that_the_config_does_not_know(self, folder):
        config = replace(drafter_config(folder), head=None)
        with pytest.raises(CheckpointError, match=r"configuration: ar_approximation\.d\.weight$"):
            check_shapes(folder, config, self.shapes(folder))


class TestLoading:
    def test_head_and_backbone_are_told_apart(self, folder):
        loaded = load_tensors(folder, read_file, **TARGET_SHAPE)
        stored = read_tensors(folder)
        assert loaded.config == drafter_config(folder)
        assert loaded.head_size == 32
        assert loaded.head.keys() == {"ug.weight", "ug.bias", "d.weight", "norm.weight"}
        for name, tensor in loaded.head.items():
            np.testing.assert_array_equal(tensor, stored[f"model.ar_approximation.{name}"])
        assert {f"model.{name}" for name in loaded.backbone} == {
            name for name in stored if "ar_approximation" not in name
        }
        np.testing.assert_array_equal(loaded.backbone["fc.weight"], stored["model.fc.weight"])

    def test_a_drafter_without_a_head(self, dflash_folder):
        loaded = load_tensors(dflash_folder, read_file, **TARGET_SHAPE)
        assert loaded.head == {}
        assert loaded.head_size == 0
        assert loaded.backbone.keys() == read_tensors(dflash_folder).keys()

    def test_another_target(self, folder):
        with pytest.raises(CheckpointError, match="its hidden size is 32, the target's is 64"):
            load_tensors(folder, read_file, **TARGET_SHAPE | {"hidden_size": 64})

    def test_quantised_weights_are_refused_before_they_are_read(self, folder):
        tensors: dict[str, Any] = read_tensors(folder)
        tensors["model.fc.weight"] = tensors["model.fc.weight"].astype(np.int8)
        save(folder, read_config(folder), tensors)
        with pytest.raises(CheckpointError, match="holds tensors of type I8; supported are"):
            load_tensors(folder, pytest.fail, **TARGET_SHAPE)
        tensors["model.fc.weight"] = np.zeros((32, 4), np.uint32)
        tensors |= {f"model.fc.{part}": np.zeros((32, 1), "f4") for part in ("scales", "biases")}
        mode = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        for quantisation in (mode, mode | {"mode": "affine", "model.fc": mode}):
            save(folder, read_config(folder) | {"quantization": quantisation}, tensors)
            with pytest.raises(CheckpointError, match="mode 'mxfp4'; the mode 'affine' is"):
                load_tensors(folder, pytest.fail, **TARGET_SHAPE)


def test_a_backend_for_block_drafters_refuses_a_head_that_drafts_depth_by_depth(tmp_path):
    target, head = write_mtp_pair(tmp_path, "eagle3")
    shape = {name: read_config(target)[name] for name in TARGET_SHAPE}
    with pytest.raises(UnsupportedModelError, match="has the head 'eagle3', which drafts depth"):
        load_tensors(head, read_file, **shape)
    config = read_layout(head, **shape).config
    with pytest.raises(UnsupportedModelError, match="a test does not support"):
        refuse_extensions(config, "a test")
