"""The dtype of models on a CPU where the user names none."""

import gc
import json
import weakref

import pytest

from treeflash.config import LoadConfig
from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.models import write_target

require("torch")

from treeflash_cuda import backend as loading
from treeflash_cuda import exact, target_loading
from treeflash_cuda.backend import load
from treeflash_cuda.cpu import default_dtype

HALF = "bfloat16", "float16"


def write(folder, dtype, family="llama", **settings):
    write_target(folder, family, seed=1, vocab_size=24)
    path = folder / "config.json"
    settings |= {"dtype": dtype, "torch_dtype": dtype}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def load_on_cpu(folder, **settings):
    return load(folder, None, LoadConfig(device="cpu", **settings))


@pytest.fixture
def loaded(monkeypatch):
    """References to all targets whose weights were read."""
    found, read = [], target_loading.read_target

    def remember(*args, **kwargs):
        gc.collect()
        assert not any(reference() for reference in found), "two targets are in memory"
        target = read(*args, **kwargs)
        found.append(weakref.ref(target))
        return target

    monkeypatch.setattr(target_loading, "read_target", remember)
    return found


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_stays_where_it_is_exact(tmp_path, recwarn, loaded, dtype):
    backend = load_on_cpu(write(tmp_path, dtype))
    assert (backend.dtype, backend.inexact) == (dtype, None)
    assert len(loaded) == 1
    assert not recwarn.list


def test_float32_stays_float32(tmp_path, recwarn):
    backend = load_on_cpu(write(tmp_path, "float32"))
    assert backend.dtype == "float32"
    assert "float32 rounding" in backend.inexact
    assert not recwarn.list


@pytest.mark.parametrize("settings", [{"exact": False}, {"kv_bits": 8}])
def test_without_exact_mode_the_dtype_is_float32(tmp_path, recwarn, settings):
    assert load_on_cpu(write(tmp_path, "bfloat16"), **settings).dtype == "float32"
    assert not recwarn.list


@pytest.mark.parametrize("dtype", HALF)
def test_a_processor_without_products_in_half_precision_takes_float32(
    tmp_path, monkeypatch, recwarn, dtype
):
    for name in ("uses_onednn", "uses_fbgemm"):
        monkeypatch.setattr(default_dtype, name, lambda _: False)
    assert load_on_cpu(write(tmp_path, dtype)).dtype == "float32"
    assert not recwarn.list


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("qwen3_moe", {"hidden_act": "gelu"}, "does not support the products of"),
        ("qwen3_5", {}, "does not support recurrent layers"),
        (
            "llama",
            {"attn_logit_softcapping": 30.0, "hidden_act": "gelu"},
            "does not support soft-capped scores",
        ),
    ],
)
def test_a_target_that_is_known_to_be_inexact_is_read_once(
    tmp_path, loaded, family, settings, reason
):
    folder = write(tmp_path, "bfloat16", family, **settings)
    with pytest.warns(UserWarning, match=f"running in float32, because .*{reason}") as lines:
        backend = load_on_cpu(folder)
    assert backend.dtype == "float32"
    assert (len(loaded), len(lines)) == (1, 1)


@pytest.mark.parametrize("place", ["check_attention", "check_exact"])
def test_a_machine_that_is_inexact_takes_float32_with_one_line(
    tmp_path, monkeypatch, loaded, place
):
    """The weights in half precision are freed before the others are read."""

    def refuse(*_):
        raise UnsupportedModelError("exact mode is not possible for this target: a test")

    owner = (
        "treeflash_cuda.cpu.decoder_target" if place == "check_attention" else loading.CudaBackend
    )
    if isinstance(owner, str):
        monkeypatch.setattr(f"{owner}.{place}", refuse)
    else:
        monkeypatch.setattr(owner, place, refuse)
    with pytest.warns(UserWarning, match="running in float32, because .*: a test$") as lines:
        backend = load_on_cpu(write(tmp_path, "bfloat16"))
    assert (backend.dtype, len(loaded), len(lines)) == ("float32", 2, 1)


def test_exact_mode_that_half_precision_refuses_is_tried_in_float32(tmp_path, monkeypatch):
    check, tried = exact.check_gates, []

    def only_float32(gated, size, dtype):
        tried.append(dtype.itemsize)
        if dtype.itemsize == 2:
            raise UnsupportedModelError("a test")
        check(gated, size, dtype)

    monkeypatch.setattr("treeflash_cuda.cpu.decoder_target.check_gates", only_float32)
    with pytest.warns(UserWarning, match="running in float32"):
        backend = load_on_cpu(write(tmp_path, "bfloat16"), exact=True)
    assert (backend.dtype, backend.inexact, tried) == ("float32", None, [2, 4])


def test_another_error_is_no_reason_to_load_again(tmp_path, loaded):
    folder = write(tmp_path / "target", "bfloat16")
    with pytest.raises(CheckpointError):
        load(folder, tmp_path / "missing", LoadConfig(device="cpu"))
    assert len(loaded) == 1
