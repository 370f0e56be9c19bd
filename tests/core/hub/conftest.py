"""A machine with an empty home and no network, for tests of where models come from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants

from treeflash.hub import client, gguf, models


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home, in which caches of treeflash and of the hub would be `cache` and `hub`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def unreachable(*args: object, **kwargs: object) -> str:
    """Fail as whatever needs a network does without one."""
    raise ConnectionError("name or service not known\nsecond line")


@dataclass
class Network:
    """What the hub, pip and the converter answer; a test sets what it needs."""

    snapshot_download: Callable[..., str] = unreachable
    model_info: Callable[..., object] = unreachable
    list_repo_files: Callable[..., list[str]] = unreachable
    run: Callable[..., object] = unreachable
    convert_gguf: Callable[..., None] = gguf.convert_gguf


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    """A machine without network."""
    network = Network()

    def answer(name: str) -> Callable[..., object]:
        return lambda *args, **kwargs: getattr(network, name)(*args, **kwargs)

    for owner, name in (
        (client, "snapshot_download"),
        (client.HfApi, "model_info"),
        (client.HfApi, "list_repo_files"),
        (models.subprocess, "run"),
        (gguf, "convert_gguf"),
    ):
        monkeypatch.setattr(owner, name, answer(name))
    return network


@pytest.fixture
def add_model(home: Path) -> Callable[..., Path]:
    """Write files of a model, 1,000 bytes each, into a folder of the home."""

    def add(name: str, *files: str) -> Path:
        folder = home / name
        folder.mkdir(parents=True)
        for file in files or ("config.json", "model.safetensors"):
            (folder / file).write_bytes(b"0" * 1000)
        return folder

    return add
