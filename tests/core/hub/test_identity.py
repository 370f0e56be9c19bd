"""What stored states of a pair depend on."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from failures import failing

from treeflash.config import LoadConfig
from treeflash.hub import identity
from treeflash.hub.identity import pair_identity
from treeflash.testing.models import write_target

BACKEND = SimpleNamespace(
    name="cuda",
    device="cpu",
    device_name="a processor",
    dtype="float32",
    inexact="rounding",
    images="it has no vision tower",
)


@pytest.fixture
def folder(tmp_path):
    write_target(tmp_path / "target", "llama", seed=1)
    return tmp_path / "target"


def test_a_fine_tune_with_the_same_headers_is_another_pair(folder, tmp_path):
    loaded, memory = LoadConfig(), tmp_path / "hashes"
    first = pair_identity(BACKEND, loaded, [folder, None], memory)
    assert pair_identity(BACKEND, loaded, [folder, None], memory) == first
    (file,) = folder.glob("*.safetensors")
    contents = file.read_bytes()
    file.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    assert pair_identity(BACKEND, loaded, [folder, None], memory) != first
    file.write_bytes(contents)
    assert pair_identity(BACKEND, loaded, [folder, None], memory) == first


@pytest.mark.parametrize(
    "change",
    [
        {"name": "mlx"},
        {"device": "cuda:0"},
        {"device_name": "another"},
        {"dtype": "bfloat16"},
        {"inexact": None},
        {"images": SimpleNamespace()},  # other layers run a target that takes some
    ],
)
def test_the_way_of_running_counts(folder, tmp_path, change):
    other = SimpleNamespace(**{**vars(BACKEND), **change})
    pairs = [pair_identity(x, LoadConfig(), [folder], tmp_path / "m") for x in (BACKEND, other)]
    assert pairs[0] != pairs[1]


def test_settings_versions_and_drafters_count(folder, tmp_path, monkeypatch):
    loaded, memory = LoadConfig(), tmp_path / "hashes"
    write_target(tmp_path / "drafter", "llama", seed=2)
    found = {
        pair_identity(BACKEND, loaded, [folder, None], memory),
        pair_identity(BACKEND, replace(loaded, kv_bits=8), [folder, None], memory),
        pair_identity(BACKEND, loaded, [folder, tmp_path / "drafter"], memory),
    }
    monkeypatch.setattr(identity, "version", lambda _: "99")
    found.add(pair_identity(BACKEND, loaded, [folder, None], memory))
    assert len(found) == 4


def test_weights_are_read_once(folder, tmp_path):
    memory = tmp_path / "hashes"
    first = pair_identity(BACKEND, LoadConfig(), [folder], memory)
    with failing(identity.hashlib, "file_digest", AssertionError("read again")):
        assert pair_identity(BACKEND, LoadConfig(), [folder], memory) == first


def test_hashes_that_cannot_be_remembered_are_computed_again(folder, tmp_path):
    memory = tmp_path / "file"
    memory.write_text("")
    first = pair_identity(BACKEND, LoadConfig(), [folder], memory)
    assert pair_identity(BACKEND, LoadConfig(), [folder], tmp_path / "hashes") == first
