import json
import os
import subprocess
import sys

import pytest

from treeflash.config import LoadConfig
from treeflash.errors import BackendError, CheckpointError, ConfigError, UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.models import edit_config, write_drafter, write_target

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from mlx import nn
from mlx_lm.utils import load_model
from treeflash_mlx import backend as backend_module
from treeflash_mlx.backend import load


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_target(pair, tmp_path, bits):
    """A folder as `mlx_lm.convert -q` writes it."""
    model, config = load_model(pair[0])
    nn.quantize(model, 32, bits)
    config["quantization"] = {"group_size": 32, "bits": bits}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model.save_weights(str(tmp_path / "model.safetensors"))
    backend = load(tmp_path, pair[1], LoadConfig())
    assert isinstance(backend.target.lm_head, nn.QuantizedLinear)
    assert backend.target.embed(mx.array([1])).shape == (1, 128)


def test_impossible_kv_bits_are_refused(families, pair, tmp_path):
    with pytest.raises(ConfigError, match="kv_bits must be one of"):
        load(*pair, LoadConfig(kv_bits=7))
    families.write(tmp_path / "narrow", "llama")
    with pytest.raises(ConfigError, match="multiple of 32"):
        load(tmp_path / "narrow", None, LoadConfig(kv_bits=8))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_the_one_asked_for(pair, dtype):
    backend = load(*pair, LoadConfig(dtype=dtype))
    assert backend.dtype == dtype
    assert backend.drafter_model.fc.weight.dtype == getattr(mx, dtype)


def test_missing_device_is_refused(pair):
    if not mx.metal.is_available():
        with pytest.raises(BackendError, match="no GPU"):
            load(*pair, LoadConfig(device="gpu"))
    with pytest.raises(BackendError, match="gpu or cpu"):
        load(*pair, LoadConfig(device="cuda:0"))
    assert load(*pair, LoadConfig(device="cpu")).device == "cpu"


def test_model_type_that_mlx_lm_lacks_is_named(pair, tmp_path):
    write_target(tmp_path, "llama", seed=0)
    edit_config(tmp_path, lambda config: config.update(model_type="nothing"))
    with pytest.raises(UnsupportedModelError, match="'nothing'"):
        load(tmp_path, None, LoadConfig())


def test_scaling_by_column_is_refused_for_drafting_only(families, tmp_path, pair):
    families.write(tmp_path / "target", "ministral3")
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=0)
    load(tmp_path / "target", None, LoadConfig())
    with pytest.raises(UnsupportedModelError, match="by column"):
        load(tmp_path / "target", tmp_path / "drafter", LoadConfig())


@pytest.mark.parametrize("which", [0, 1], ids=["target", "drafter"])
def test_damaged_file_is_named(pair, tmp_path, which):
    folders = []
    for i, source in enumerate(pair):
        folder = tmp_path / str(i)
        folder.mkdir()
        for file in source.iterdir():
            data = file.read_bytes()
            cut = i == which and file.suffix == ".safetensors"
            (folder / file.name).write_bytes(data[: len(data) // 2] if cut else data)
        folders.append(folder)
    with pytest.raises(CheckpointError) as caught:
        load(*folders, LoadConfig())
    assert str(folders[which]) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_experts_in_half_precision_on_a_cpu_are_refused_in_one_line(families, tmp_path, dtype):
    families.write(tmp_path, "qwen3_moe")
    with pytest.raises(ConfigError, match=r"in float32 only; use dtype float32") as caught:
        load(tmp_path, None, LoadConfig(device="cpu", dtype=dtype))
    assert "\n" not in str(caught.value)
    assert load(tmp_path, None, LoadConfig(device="cpu", dtype="float32")).dtype == "float32"


@pytest.mark.parametrize("late", [False, True])
def test_tf32_that_may_be_on_is_one_warning(monkeypatch, recwarn, late):
    monkeypatch.setattr(backend_module, "TF32_MAY_BE_ON", late)
    backend_module.warn_of_tf32()
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == late
    assert all("MLX_ENABLE_TF32=0" in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("before", "set_by_user", "late"),
    [("", False, False), ("import mlx.core, ", False, True), ("import mlx.core, ", True, False)],
)
def test_tf32_may_be_on_if_mlx_was_imported_first(before, set_by_user, late):
    """MLX reads the variable once, perhaps before the backend is imported."""
    program = f"{before or 'import '}treeflash_mlx; print(treeflash_mlx.TF32_MAY_BE_ON)"
    env = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    if set_by_user:
        env["MLX_ENABLE_TF32"] = "0"
    run = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(late)
