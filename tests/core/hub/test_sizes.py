"""A pair that does not fit is refused before it is fetched, and a smaller one is named."""

from types import SimpleNamespace
from typing import Any

import pytest
from failures import failing

import treeflash
from treeflash import language_model
from treeflash.config import GIB
from treeflash.errors import ConfigError
from treeflash.hub import published, sizes
from treeflash.reference import backend

GIB_OF = {
    "Qwen/Qwen3-8B": 15.3,
    "mlx-community/Qwen3-8B-8bit": 8.1,
    "mlx-community/Qwen3-8B-4bit": 4.3,
    "mlx-community/Qwen3-4B-4bit": 2.1,
    "peerrh/treeflash-qwen3-8b": 1.9,
    "peerrh/treeflash-qwen3-4b": 1.0,
    "someone/Large-3bit": 20.0,
}


@pytest.fixture(autouse=True)
def hub(network) -> list[str]:
    """A hub that tells sizes; returns the models that were asked for."""
    asked: list[str] = []

    def model_info(_: object, name: str, *, timeout: float, files_metadata: bool) -> Any:
        asked.append(name)
        if name not in GIB_OF:
            raise OSError("no such model")
        assert files_metadata
        files = {
            "model-00001.safetensors": int(GIB_OF[name] * GIB),
            "consolidated.safetensors": 99 * GIB,
            "config.json": 99 * GIB,
            "model-00002.safetensors": None,
        }
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=x, size=n) for x, n in files.items()]
        )

    network.model_info = model_info
    return asked


@pytest.mark.parametrize(
    ("target", "drafter", "limit", "message"),
    [
        (
            "Qwen/Qwen3-8B",
            "peerrh/treeflash-qwen3-8b",
            9.6,
            "Qwen/Qwen3-8B and its drafter have 17.2 GiB, and this GPU has 9.6 GiB for models and "
            "texts; use mlx-community/Qwen3-8B-4bit, 6.2 GiB (",
        ),
        (
            "Qwen/Qwen3-8B",
            None,
            4.8,
            "Qwen/Qwen3-8B have 15.3 GiB, and this GPU has 4.8 GiB for models and texts; use "
            "mlx-community/Qwen3-4B-4bit, 3.1 GiB (",
        ),
        ("someone/Large-3bit", None, 1.0, "1.0 GiB for models and texts; use a smaller model ("),
    ],
)
def test_both_numbers_and_the_next_smaller_choice(target, drafter, limit, message):
    with pytest.raises(ConfigError) as caught:
        sizes.refuse_pair(target, drafter, int(limit * GIB))
    assert message in str(caught.value)
    assert "--force" in str(caught.value)
    sizes.refuse_pair(target, drafter, 25 * GIB)


def test_conversions_in_fewer_bits_come_first():
    def names(target: str) -> list[str]:
        return [x for x in sizes.smaller_choices(target) if x not in sizes.COMMON_TARGETS]

    assert names("lmstudio-community/Qwen3-8B-MLX-8bit") == [
        "lmstudio-community/Qwen3-8B-MLX-6bit",
        "lmstudio-community/Qwen3-8B-MLX-4bit",
    ]
    assert names("mlx-community/Foo-bf16") == [f"mlx-community/Foo-{n}bit" for n in (8, 6, 4)]
    assert names("mlx-community/Foo-4bit") == []
    assert "mlx-community/Qwen3-4B-4bit" not in sizes.smaller_choices("mlx-community/qwen3-4b-4bit")


def test_a_folder_is_measured_and_a_pair_of_unknown_size_is_fetched(tmp_path, hub):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 100)
    assert sizes.weights_bytes(str(tmp_path)) == 100
    assert [sizes.weights_bytes(name) for name in (None, "self", published.BUNDLED_DRAFTER)] == [
        0
    ] * 3
    assert hub == []
    sizes.refuse_pair("un/known", None, 1)
    assert hub == ["un/known"]


@pytest.mark.parametrize(
    ("limit", "force", "message"),
    [
        (GIB, False, "^the weights of Qwen/Qwen3-8B have 15.3 GiB"),
        (1, True, "fetched"),
        (20 * GIB, False, "fetched"),
        (None, False, "fetched"),
    ],
)
def test_nothing_is_fetched_that_does_not_fit(monkeypatch, limit, force, message):
    monkeypatch.setattr(backend, "memory_limit", lambda: limit, raising=False)
    with (
        failing(language_model, "resolve_target", ConfigError("fetched")),
        pytest.raises(ConfigError, match=message),
    ):
        treeflash.load("Qwen/Qwen3-8B", False, backend="reference", force=force)
