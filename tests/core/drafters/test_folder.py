"""Model folders: what they hold, and each error by its message."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from treeflash.drafters.folder import (
    open_folder,
    read_config,
    read_quantised,
    read_tensors,
    stored_shapes,
    weight_files,
)
from treeflash.errors import CheckpointError


def message(text: str) -> str:
    """A pattern that matches the whole message and nothing else."""
    return f"^{re.escape(text)}$"


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        *((x, " cannot be read as JSON: ") for x in (b"{", b"", b"\xff\xfe{}", DEEP, b"9" * 5000)),
        *((x, " does not hold a JSON object") for x in (b"[]", b"3", b"null")),
    ],
)
def test_a_config_that_is_none(tmp_path, content, problem):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json{problem}"):
        read_config(tmp_path)


def test_no_config(tmp_path):
    expected = f"{tmp_path} has no config.json; it is not a model folder"
    with pytest.raises(CheckpointError, match=message(expected)):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON: "):
        read_config(tmp_path)


class TestReading:
    VALUES = np.array([[0, 1, -2.5], [3.140625, -0.00390625, 65280]], np.float32)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_float(self, tmp_path, dtype):
        values = np.clip(self.VALUES, -1000, 1000).astype(dtype)
        save_file({"a": values, "b": values[0].copy()}, tmp_path / "x.safetensors")
        tensors = read_tensors(tmp_path)
        assert tensors["a"].dtype == np.float32
        np.testing.assert_array_equal(tensors["a"], values)
        np.testing.assert_array_equal(tensors["b"], values[0])

    def test_bfloat16(self, tmp_path):
        """Written by hand, since NumPy has no such type: the upper half of each float32."""
        upper = (self.VALUES.view(np.uint32) >> 16).astype("<u2")
        write_raw(tmp_path / "x.safetensors", "BF16", self.VALUES.shape, upper.tobytes())
        tensor = read_tensors(tmp_path)["a"]
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, self.VALUES)

    def test_bfloat16_specials(self, tmp_path):
        bits = np.array([0x7F80, 0xFF80, 0x7FC0, 0x8000, 0x0001], "<u2")
        write_raw(tmp_path / "x.safetensors", "BF16", (5,), bits.tobytes())
        tensor = read_tensors(tmp_path)["a"]
        assert tensor[:2].tolist() == [np.inf, -np.inf]
        assert np.isnan(tensor[2])
        assert np.signbit(tensor[3])
        assert tensor[4] == np.float32(2.0**-133)

    def test_other_types_are_refused(self, tmp_path):
        path = tmp_path / "x.safetensors"
        save_file({"a": np.zeros(3, np.int32)}, path)
        expected = f"{path} holds tensors of type I32; supported are BF16, F16, F32, F64"
        for read in (read_tensors, stored_shapes):
            with pytest.raises(CheckpointError, match=message(expected)):
                read(tmp_path)

    @pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:4], bytes.lower])
    def test_damaged_file(self, folder, damage):
        path = folder / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))} is damaged: "):
            read_tensors(folder)
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))} is damaged: "):
            stored_shapes(folder)

    def test_other_formats_are_not_read(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        expected = f"{tmp_path} has no *.safetensors file; convert its weights"
        with pytest.raises(CheckpointError, match=message(expected)):
            weight_files(tmp_path)


def write_raw(path: Path, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    """A safetensors file with one tensor, `a`."""
    entry = {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": [0, len(data)]}}
    header = json.dumps(entry).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weights_that_mlx_has_quantised(bits, tmp_path):
    """A layer may have its own settings, and experts may be stacked."""
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(bits)
    saved, expected = {"plain.weight": mx.zeros((2, 3))}, {}
    for name, shape, group in (("a", (6, 64), 32), ("b", (3, 5, 128), 64)):
        packed = mx.quantize(mx.array(rng.normal(size=shape).astype(np.float32)), group, bits)
        expected[f"{name}.weight"] = np.array(mx.dequantize(*packed, group, bits))
        saved |= dict(
            zip((f"{name}.{x}" for x in ("weight", "scales", "biases")), packed, strict=True)
        )
    mx.save_safetensors(str(tmp_path / "model.safetensors"), saved)
    settings = {"group_size": 32, "bits": bits, "b": {"group_size": 64, "bits": bits}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": settings}))
    folder = open_folder(tmp_path)
    assert folder.tensors.keys() == {"plain.weight", *expected}
    for name, values in expected.items():
        tensor = folder.tensors[name]
        assert (tensor.shape, tensor.bits) == (values.shape, bits)
        (found,) = read_quantised(tensor.path, {name: tensor}).values()
        np.testing.assert_allclose(found, values, atol=1e-6)


@pytest.mark.parametrize(("mode", "groups"), [("mxfp4", 2), ("affine", 8)])
def test_other_quantisations_of_mlx_stay_what_they_are(mode, groups, tmp_path):
    """A mode of another kind, and groups that would have one bit for a number."""
    words = {"a.weight": np.zeros((4, 8), np.uint32)}
    words |= {f"a.{part}": np.zeros((4, groups), np.uint8) for part in ("scales", "biases")}
    save_file(words, tmp_path / "model.safetensors")
    settings = {"group_size": 32, "bits": 4, "mode": mode}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": settings}))
    folder = open_folder(tmp_path)
    assert folder.tensors["a.weight"].bits == 0
    assert folder.tensors.keys() == words.keys()
