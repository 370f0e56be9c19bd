"""DFlash and TreeFlash folders: every spelling of the configuration, every error by its message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from treeflash.drafters.checkpoints import (
    canonical_name,
    check_pair,
    check_tensors,
    default_target_layer_ids,
    drafter_config,
    read_config,
    read_tensors,
    tensor_shapes,
    weight_files,
)
from treeflash.errors import CheckpointError
from treeflash.testing.models import edit_config, write_drafter, write_target

Config = dict[str, Any]
Edit = Callable[[Config], object]

TARGET_SHAPE = {"hidden_size": 32, "vocab_size": 24, "num_hidden_layers": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A TreeFlash drafter for a target of 4 layers, hidden size 32, vocabulary 24."""
    write_target(tmp_path / "target", "qwen3", seed=0)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=1)
    return tmp_path / "drafter"


@pytest.fixture
def dflash_folder(tmp_path: Path, folder: Path) -> Path:
    write_drafter(tmp_path / "dflash", tmp_path / "target", format="dflash", seed=1)
    return tmp_path / "dflash"


@pytest.fixture
def linear_folder(tmp_path: Path, folder: Path) -> Path:
    write_drafter(tmp_path / "linear", tmp_path / "target", head="linear", seed=1)
    return tmp_path / "linear"


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
            lambda c: c.update(c.pop("dflash_config")),
            lambda c: c.update(c.pop("treeflash_config")),
            lambda c: c["treeflash_config"].update(c.pop("dflash_config")),
            lambda c: c.pop("rope_theta"),
            lambda c: c.pop("rope_parameters"),
            lambda c: c.update(layer_types=["full_attention", "full_attention"]),
            lambda c: c.update(sliding_window=None, use_sliding_window=False),
            lambda c: c.pop("attention_bias"),
            lambda c: c.update(output_multiplier=1.0, final_logit_softcapping=None),
        ],
        ids=[
            "block size inside",
            "dflash keys at top level",
            "head at top level",
            "all in treeflash_config",
            "rope_parameters only",
            "rope_theta only",
            "layer types",
            "sliding window off",
            "no attention_bias",
            "neutral scaling",
        ],
    )
    def test_spellings_mean_the_same(self, folder: Path, spell: Edit) -> None:
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
        """They are causal unless the file says otherwise, as the published code has it."""
        sliding = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
        edit_config(folder, lambda c: c.update(sliding))
        config = drafter_config(folder)
        assert config.sliding_windows == (7, None)
        assert config.causal == (True, False)
        edit_config(folder, lambda c: c.update(is_causal=False))
        assert drafter_config(folder).causal == (False, False)
        edit_config(folder, lambda c: c.update(is_causal=True))
        assert drafter_config(folder).causal == (True, True)

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
            (
                lambda c: c["treeflash_config"].update(ar_approximation="bilinear"),
                "the AR head 'bilinear' is not known; known are swiglu, linear",
            ),
            (lambda c: c.update(layer_types=["full_attention"]), "layer_types names 1 layers of 2"),
            (lambda c: c.update(output_multiplier=2.0), "output_multiplier is not supported"),
            (
                lambda c: c["dflash_config"].update(final_logit_softcapping=30.0),
                "final_logit_softcapping is not supported",
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

    def test_no_config(self, tmp_path: Path) -> None:
        expected = f"{tmp_path} has no config.json; it is not a model folder"
        with pytest.raises(CheckpointError, match=message(expected)):
            read_config(tmp_path)

    def test_config_is_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").mkdir()
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON: "):
            read_config(tmp_path)

    @pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}"])
    def test_no_json(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON: "):
            read_config(tmp_path)

    @pytest.mark.parametrize("content", ["[]", "3", "null"])
    def test_no_object(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json holds no JSON object$"):
            read_config(tmp_path)


class TestPairs:
    def test_a_pair_that_fits(self, folder: Path) -> None:
        check_pair(drafter_config(folder), **TARGET_SHAPE)

    def test_what_a_drafter_does_not_state_is_not_checked(self, folder: Path) -> None:
        config = replace(drafter_config(folder), vocab_size=None, num_target_layers=None)
        check_pair(config, hidden_size=32, vocab_size=50, num_hidden_layers=9)

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"hidden_size": 64}, "its hidden size is 64, the target's is 32"),
            ({"vocab_size": 25}, "its vocabulary has 25 tokens, the target's has 24"),
            ({"mask_token_id": 24}, "its mask token 24 is outside the vocabulary of 24"),
            ({"mask_token_id": -1}, "its mask token -1 is outside the vocabulary of 24"),
            (
                {"num_target_layers": 5},
                "it was trained for a target of 5 layers, this one has 4",
            ),
            ({"target_layer_ids": (0, 4)}, "it reads target layers [0, 4], the target has 4"),
            ({"target_layer_ids": (-1, 2)}, "it reads target layers [-1, 2], the target has 4"),
        ],
        ids=str,
    )
    def test_a_pair_that_does_not_fit(self, folder: Path, change: Config, problem: str) -> None:
        config = replace(drafter_config(folder), **change)
        with pytest.raises(
            CheckpointError, match=message(f"drafter and target do not fit: {problem}")
        ):
            check_pair(config, **TARGET_SHAPE)


class TestTensors:
    def shapes(self, folder: Path) -> dict[str, tuple[int, ...]]:
        return {canonical_name(name): t.shape for name, t in read_tensors(folder).items()}

    def test_canonical_name(self) -> None:
        assert canonical_name("model.fc.weight") == "fc.weight"
        assert canonical_name("fc.weight") == "fc.weight"

    def test_both_formats_have_the_tensors_of_their_configs(
        self, folder: Path, dflash_folder: Path, linear_folder: Path
    ) -> None:
        for each, head_tensors in ((folder, 4), (linear_folder, 2), (dflash_folder, 0)):
            config, shapes = drafter_config(each), self.shapes(each)
            check_tensors(each, config, shapes)
            assert shapes == tensor_shapes(config, head_size=32)
            assert sum("ar_approximation" in name for name in shapes) == head_tensors

    def test_shapes_by_hand(self, folder: Path) -> None:
        config = replace(drafter_config(folder), attention_bias=True, head_dim=16)
        shapes = tensor_shapes(config, head_size=5)
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

    def test_shapes_of_a_linear_head_by_hand(self, folder: Path) -> None:
        shapes = tensor_shapes(replace(drafter_config(folder), head="linear"))
        assert shapes["ar_approximation.d.weight"] == (32, 64)
        assert shapes["ar_approximation.norm.weight"] == (32,)
        assert "ar_approximation.ug.weight" not in shapes

    def test_every_missing_tensor_is_named(self, folder: Path) -> None:
        config, shapes = drafter_config(folder), self.shapes(folder)
        for name, shape in shapes.items():
            rest = {other: shapes[other] for other in shapes if other != name}
            expected = f"{folder} lacks the tensor {name} of shape {shape}"
            with pytest.raises(CheckpointError, match=message(expected)):
                check_tensors(folder, config, rest)

    def test_a_head_that_is_missing_altogether(self, folder: Path, dflash_folder: Path) -> None:
        with pytest.raises(CheckpointError, match=r"lacks the tensor ar_approximation\."):
            check_tensors(folder, drafter_config(folder), self.shapes(dflash_folder))

    @pytest.mark.parametrize(
        "name", ["fc.weight", "layers.0.self_attn.k_norm.weight", "ar_approximation.ug.weight"]
    )
    def test_misshapen_tensor_is_named(self, folder: Path, name: str) -> None:
        shapes = self.shapes(folder)
        expected = f"{folder}: tensor {name} has shape (3, 5), config.json asks for {shapes[name]}"
        with pytest.raises(CheckpointError, match=message(expected)):
            check_tensors(folder, drafter_config(folder), shapes | {name: (3, 5)})

    def test_unexpected_tensor_is_named(self, folder: Path) -> None:
        shapes = self.shapes(folder) | {"layers.2.mlp.up_proj.weight": (64, 32), "z": (1,)}
        expected = (
            f"{folder} holds a tensor that no DFlash or TreeFlash drafter of its configuration "
            "has: layers.2.mlp.up_proj.weight"
        )
        with pytest.raises(CheckpointError, match=message(expected)):
            check_tensors(folder, drafter_config(folder), shapes)

    def test_a_head_that_the_config_does_not_know(self, folder: Path) -> None:
        config = replace(drafter_config(folder), head=None)
        with pytest.raises(CheckpointError, match=r"has: ar_approximation\.d\.weight$"):
            check_tensors(folder, config, self.shapes(folder))


class TestReading:
    VALUES = np.array([[0, 1, -2.5], [3.140625, -0.00390625, 65280]], np.float32)

    def test_sharded_folder_equals_one_file(self, folder: Path, tmp_path: Path) -> None:
        write_drafter(tmp_path / "sharded", tmp_path / "target", seed=1, sharded=True)
        assert [path.name for path in weight_files(tmp_path / "sharded")] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        one, two = read_tensors(folder), read_tensors(tmp_path / "sharded")
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            np.testing.assert_array_equal(tensor, two[name])

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_float(self, tmp_path: Path, dtype: type) -> None:
        values = np.clip(self.VALUES, -1000, 1000).astype(dtype)
        save_file({"a": values, "b": values[0].copy()}, tmp_path / "x.safetensors")
        tensors = read_tensors(tmp_path)
        assert tensors["a"].dtype == np.float32
        np.testing.assert_array_equal(tensors["a"], values)
        np.testing.assert_array_equal(tensors["b"], values[0])

    def test_bfloat16(self, tmp_path: Path) -> None:
        """Written by hand, since NumPy has no such type: the upper half of each float32."""
        upper = (self.VALUES.view(np.uint32) >> 16).astype("<u2")
        write_raw(tmp_path / "x.safetensors", "BF16", self.VALUES.shape, upper.tobytes())
        tensor = read_tensors(tmp_path)["a"]
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, self.VALUES)

    def test_bfloat16_specials(self, tmp_path: Path) -> None:
        bits = np.array([0x7F80, 0xFF80, 0x7FC0, 0x8000, 0x0001], "<u2")
        write_raw(tmp_path / "x.safetensors", "BF16", (5,), bits.tobytes())
        tensor = read_tensors(tmp_path)["a"]
        assert tensor[:2].tolist() == [np.inf, -np.inf]
        assert np.isnan(tensor[2])
        assert np.signbit(tensor[3])
        assert tensor[4] == np.float32(2.0**-133)

    def test_other_types_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"a": np.zeros(3, np.int32)}, path)
        expected = f"{path} holds tensors of type I32; floating point is needed"
        with pytest.raises(CheckpointError, match=message(expected)):
            read_tensors(tmp_path)

    @pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:4], bytes.lower])
    def test_damaged_file(self, folder: Path, damage: Callable[[bytes], bytes]) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))} is damaged: "):
            read_tensors(folder)

    def test_other_formats_are_not_read(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        expected = f"{tmp_path} has no *.safetensors file; other formats are not read"
        with pytest.raises(CheckpointError, match=message(expected)):
            weight_files(tmp_path)


def write_raw(path: Path, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    """A safetensors file with one tensor, `a`."""
    entry = {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": [0, len(data)]}}
    header = json.dumps(entry).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
