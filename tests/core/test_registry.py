"""Backends by name, from entry points made up for the test."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from treeflash import registry
from treeflash.config import LoadConfig
from treeflash.errors import BackendError
from treeflash.reference.backend import load as load_reference

REFERENCE = ("reference", "treeflash.reference.backend:load")


def register(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str]) -> None:
    """Make these the registered backends."""

    def entry_points(*, group: str) -> list[EntryPoint]:
        assert group == "treeflash.backends"
        return [EntryPoint(name, value, group) for name, value in entries]

    monkeypatch.setattr(registry, "entry_points", entry_points)


def install(monkeypatch: pytest.MonkeyPatch, *frameworks: str) -> None:
    """Make these the installed frameworks."""
    found = {name: object() for name in frameworks}
    monkeypatch.setattr(registry, "find_spec", found.get)


TORCH, MLX = ["torch", "transformers"], ["mlx", "mlx_lm"]


def platform(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(registry.sys, "platform", system)
    monkeypatch.setattr(registry.platform, "machine", lambda: machine)


@pytest.mark.parametrize("times", [1, 2])
def test_the_loader_is_the_entry_point(monkeypatch, times):
    """A source tree on the path beside its installation lists everything twice."""
    register(monkeypatch, *[REFERENCE] * times)
    assert registry.loader("reference") is load_reference


def test_backend_of_another_package(monkeypatch, tmp_path):
    """Nothing is imported before its name is asked for."""
    (tmp_path / "abacus_backend.py").write_text("def load(*args): return 'beads'\n")
    monkeypatch.syspath_prepend(tmp_path)
    register(monkeypatch, REFERENCE, ("abacus", "abacus_backend:load"))
    assert set(registry.available()) == {"reference", "abacus"}
    registry.loader("reference")
    assert "abacus_backend" not in sys.modules
    assert registry.loader("abacus")("target", "drafter", None) == "beads"
    del sys.modules["abacus_backend"]


def test_a_framework_that_cannot_be_imported(monkeypatch, tmp_path):
    """Its version may be one that the backend does not know, or its libraries may be missing."""
    (tmp_path / "broken_backend.py").write_text("raise ImportError('no libtorch.so')\n")
    monkeypatch.syspath_prepend(tmp_path)
    register(monkeypatch, ("broken", "broken_backend:load"))
    with pytest.raises(BackendError) as caught:
        registry.loader("broken")
    assert str(caught.value) == (
        "backend 'broken' cannot be imported (no libtorch.so); update its packages, or install "
        "them again"
    )


NOWHERE = "a_module_that_must_not_be_imported:load"
OTHERS = REFERENCE, ("mlx", NOWHERE)
TWICE = ("cuda", "treeflash_cuda.backend:load"), ("cuda", "other.cuda:load")
REFUSED = [
    ("tpu", OTHERS, [], "unknown backend 'tpu'; registered are: mlx, reference"),
    ("reference", (), [], "unknown backend 'reference'; registered are: none"),
    (
        "cuda",
        TWICE,
        TORCH,
        "backend 'cuda' is registered twice, by treeflash_cuda.backend:load and "
        "other.cuda:load; uninstall one of the two packages",
    ),
    *(
        (
            name,
            ((name, NOWHERE),),
            there,
            f"backend '{name}' needs {missing}; pip install '.[{name}]' in a clone of treeflash",
        )
        for name, there, missing in (
            ("cpu", [], "torch"),
            ("cuda", [], "torch"),
            ("cuda", ["torch"], "transformers"),
            ("mlx", [], "mlx"),
            ("mlx", ["mlx"], "mlx_lm"),
        )
    ),
]


@pytest.mark.parametrize(("name", "entries", "frameworks", "message"), REFUSED)
def test_a_backend_that_cannot_be_loaded(monkeypatch, name, entries, frameworks, message):
    register(monkeypatch, *entries)
    install(monkeypatch, *frameworks)
    with pytest.raises(BackendError) as caught:
        registry.loader(name)
    assert str(caught.value) == message
    assert registry.installed(name) == ("needs" not in message)


def test_names_that_are_registered_twice_are_not_listed(monkeypatch):
    register(monkeypatch, *TWICE)
    with pytest.raises(BackendError, match="backend 'cuda' is registered twice"):
        registry.available()


def test_backends_of_other_packages_count_as_installed(monkeypatch):
    install(monkeypatch)
    assert registry.installed("abacus")
    assert registry.installed("reference")


@pytest.mark.parametrize(
    ("system", "machine", "frameworks", "expected"),
    [
        ("darwin", "arm64", [*TORCH, *MLX], "mlx"),
        ("darwin", "arm64", [*TORCH, "mlx"], "cuda"),
        ("darwin", "x86_64", [*TORCH, *MLX], "cuda"),
        ("linux", "x86_64", [*TORCH, *MLX], "cuda"),
        ("linux", "aarch64", [*TORCH, *MLX], "cuda"),
        ("linux", "x86_64", MLX, "mlx"),
        ("linux", "x86_64", ["mlx"], "reference"),
    ],
)
def test_best(monkeypatch, system, machine, frameworks, expected):
    platform(monkeypatch, system, machine)
    install(monkeypatch, *frameworks)
    assert registry.default_backend() == expected


FALLBACK = """
from treeflash.config import LoadConfig
from treeflash.errors import BackendError, CPUBuildError
from treeflash.registry import fall_back_to_cpu

def run(config):
    if config.device is None:
        raise {error}("no CUDA device is available; pass --device cpu to run on the CPU")
    return config.device

print(fall_back_to_cpu(run, LoadConfig(), named=False))
"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("BackendError", "no CUDA device is available; running on the CPU"),
        ("CPUBuildError", "running on the CPU"),
    ],
)
def test_running_on_the_cpu_for_want_of_a_device_is_one_line(error, line):
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK.format(error=error)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "cpu\n"
    assert done.stderr == f"{line}\n"


@pytest.mark.parametrize(
    ("config", "named", "message"),
    [
        (LoadConfig(), True, r"no CUDA device is available; pass --device cpu$"),
        (LoadConfig(device_map="auto"), False, r"no CUDA device .*, and .*; remove device_map$"),
    ],
)
def test_what_the_user_asked_for_is_not_replaced(config, named, message):
    def run(config: LoadConfig) -> None:
        raise BackendError("no CUDA device is available; pass --device cpu")

    with pytest.raises(BackendError, match=message):
        registry.fall_back_to_cpu(run, config, named=named)


def test_mlx_says_what_a_translated_python_lacks(monkeypatch):
    """Its packages exist for arm64 only, so that to install them would fail, too."""
    register(monkeypatch, ("mlx", "treeflash_mlx.backend:load"))
    install(monkeypatch, *TORCH)
    platform(monkeypatch, "darwin", "x86_64")
    with pytest.raises(BackendError, match=r"needs a native Python .* is built for x86_64"):
        registry.loader("mlx")
    platform(monkeypatch, "darwin", "arm64")
    with pytest.raises(BackendError, match="needs mlx; pip install"):
        registry.loader("mlx")
