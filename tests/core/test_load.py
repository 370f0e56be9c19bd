"""Loading a pair: backends, devices and drafters; what importing the package imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

import treeflash
from treeflash import language_model
from treeflash.errors import BackendError, CheckpointError, ConfigError
from treeflash.language_model import load
from treeflash.registry import installed


@pytest.mark.parametrize("backend", ["reference", "cuda", "mlx"])
def test_an_unknown_device_is_refused_before_anything_is_fetched(backend, monkeypatch):
    if not installed(backend):
        pytest.skip(f"needs the framework of {backend}")
    monkeypatch.setattr(language_model, "resolve_target", lambda name: pytest.fail("fetched"))
    with pytest.raises(BackendError, match="tpu"):
        load(backend=backend, device="tpu")


def test_a_device_is_named_by_text(monkeypatch):
    monkeypatch.setattr(language_model, "resolve_target", lambda name: pytest.fail("fetched"))
    with pytest.raises(ConfigError, match=r"device must be the name of a device.*got 0"):
        load(backend="reference", device=0)


def test_load_without_a_drafter_decodes_plainly(tiny_pair):
    model = load(tiny_pair[0], False, backend="reference")
    assert model.backend.drafter_config is None
    assert model.generate("hi", max_tokens=3).method == "ar"


def test_load_requires_a_drafter_if_none_is_published(tiny_pair):
    with pytest.raises(CheckpointError, match="--drafter"):
        load(tiny_pair[0], backend="reference")


def test_only_an_automatic_choice_falls_back_to_the_cpu(tiny_pair, monkeypatch):
    devices = []

    def loader(target, drafter, config):
        devices.append(config.device)
        if config.device != "cpu":
            raise BackendError("no accelerator; pass --device cpu")
        return object()

    monkeypatch.setattr(language_model, "best", lambda: "cuda")
    monkeypatch.setattr(language_model, "loader", lambda name: loader)
    load(*tiny_pair)
    assert devices == [None, "cpu"]
    for choice in ({"backend": "cuda"}, {"device": "cuda:1"}):
        with pytest.raises(BackendError, match="no accelerator"):
            load(*tiny_pair, **choice)


def test_unknown_backend_and_dtype(tiny_pair):
    with pytest.raises(BackendError, match="unknown backend 'abacus'"):
        load(*tiny_pair, backend="abacus")
    with pytest.raises(ConfigError, match="unknown dtype"):
        load(*tiny_pair, dtype="float8")


def test_importing_the_package_imports_no_framework():
    code = (
        "import sys, treeflash, treeflash.generate;"
        "print([m for m in ('torch', 'mlx', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0)


def test_public_names():
    for name in treeflash.__all__:
        assert getattr(treeflash, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = treeflash.nonsense
