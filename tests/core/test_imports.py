"""Imports point one way, and the core knows no framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import treeflash

FRAMEWORKS = {"torch", "mlx", "mlx_lm"}
# The packages and modules of `treeflash`, lowest layer first: each imports only from lower layers.
LAYERS = [
    {"errors"},
    {"config", "drafter_config"},
    {"decoding"},
    {"drafters", "hub"},
    {"text"},
    {"registry"},
    {"language_model"},
    {"cli"},
    {"evaluation", "diagnosis", "training", "serving"},
    {"convert", "generate", "serve", "evaluate", "doctor", "distill", "train"},
]
# The same inside `decoding`: data types, interfaces, what one text needs, the loop, many texts.
DECODING = [
    {"transitions", "gumbel"},
    {"tree", "calibration", "recurrence", "snapshots", "text_state"},
    {"acceptance", "sampling"},
    {"choices"},
    {"constraints", "interfaces", "penalties"},
    {"text_session", "one_by_one", "prefix_cache", "proposals", "requests"},
    {"probe", "verify_costs"},
    {"adaptive_budget", "loop"},
    {"running_text", "statistics"},
    {"iteration"},
    {"scheduler"},
    {"decode_text"},
]
DATA_TYPES = {
    *("transitions", "tree", "recurrence", "snapshots", "text_state"),
    *("acceptance", "gumbel", "sampling", "choices", "interfaces"),
}
# The same inside `drafters`: what a folder holds, the formats, the choice of one, loading.
DRAFTERS = [
    {"folder", "rope"},
    {"backbone"},
    {"dflash"},
    {"dflash2", "domino", "markov", "treeflash"},
    {"deepspec", "specforge", "speculators"},
    {"formats"},
    {"loading"},
    {"conversion"},
]
# What a backend may import besides its own modules.
FOR_BACKENDS = {
    "errors",
    "config",
    "drafter_config",
    "drafters",
    *(f"decoding.{name}" for name in DATA_TYPES),
    *(f"decoding.{name}" for name in ("one_by_one", "text_session", "probe")),
}
# What its modules for training may import.
FOR_TRAINING = FOR_BACKENDS | {"training"}


def modules_of(package: str, folder: Path) -> dict[str, Path]:
    """The modules of a package by name."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (package, *path.relative_to(folder).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


ROOT = Path(treeflash.__file__).parent
ALL = modules_of("treeflash", ROOT)


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path} has a relative import"
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:  # `from package import module` imports the module
                module = f"{node.module}.{alias.name}"
                yield module if module in ALL else node.module


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


CORE = {name: path for name, path in ALL.items() if not inside(name, "treeflash.testing")}
REFERENCE = {name: path for name, path in CORE.items() if inside(name, "treeflash.reference")}


def backend_modules(package: str) -> dict[str, Path]:
    spec = find_spec(package)
    assert spec is not None, f"{package} is not on the path"
    (folder,) = spec.submodule_search_locations or ()
    return modules_of(package, Path(folder))


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def layer_of(name: str, layers: list[set[str]]) -> int:
    """The index of the layer that a module belongs to."""
    (found,) = (i for i, layer in enumerate(layers) if name.split(".")[0] in layer)
    return found


def test_the_files_are_found() -> None:
    """The laws below would hold for no files at all."""
    assert "treeflash.reference.target" in REFERENCE
    assert "treeflash.config" in set(imports_of(ROOT / "decoding" / "loop.py"))


def test_importing_all_of_the_core_brings_no_framework() -> None:
    names = [name for name in CORE if not name.endswith("__main__")]
    if find_spec("fastapi") is None:  # the extra `serve` is not installed
        names = [name for name in names if not inside(name, "treeflash.serving")]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    found = {FRAMEWORKS} & set(sys.modules)
    if found:
        print(name, "imports", *found)
        break
"""
    assert run(code) == ""


@pytest.mark.parametrize("name", CORE)
def test_core_files_name_no_framework(name: str) -> None:
    """Not even inside a function: what needs a framework is reached through the registry."""
    assert not [found for found in imports_of(CORE[name]) if found.split(".")[0] in FRAMEWORKS]


def test_no_module_imports_itself_in_a_circle() -> None:
    """Raises CycleError, which names the circle."""
    graph = {
        name: {found for found in imports_of(path) if found in ALL and found != name}
        for name, path in ALL.items()
        if name != "treeflash.testing"  # the package gathers its modules
    }
    TopologicalSorter(graph).prepare()


def test_no_package_imports_itself_in_a_circle() -> None:
    """Modules may be free of circles while their packages import each other."""

    def package(name: str) -> str:
        return ".".join(name.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for name, path in ALL.items():
        found = {package(other) for other in imports_of(path) if other in ALL}
        graph.setdefault(package(name), set()).update(found - {package(name), "treeflash"})
    graph.pop("treeflash")  # its `__init__` gathers what a user calls
    assert {"treeflash.decoding", "treeflash.reference", "treeflash.testing"} <= graph.keys()
    TopologicalSorter(graph).prepare()


def check_layers(package: str, layers: list[set[str]]) -> None:
    """Every module of a package belongs to a layer and imports from its own or lower ones.

    Modules of one layer that are packages may import their own modules, not each other.
    """
    prefix = package + "."
    for name, path in CORE.items():
        if name in REFERENCE or not name.startswith(prefix):
            continue
        own = name.removeprefix(prefix)
        for found in imports_of(path):
            if found not in ALL or not found.startswith(prefix):
                continue
            other = found.removeprefix(prefix)
            if other.split(".")[0] != own.split(".")[0]:
                assert layer_of(other, layers) < layer_of(own, layers), f"{name} imports {found}"


def test_packages_import_downwards() -> None:
    check_layers("treeflash", LAYERS)


def test_decoding_imports_downwards() -> None:
    check_layers("treeflash.decoding", DECODING)


def test_drafters_import_downwards() -> None:
    check_layers("treeflash.drafters", DRAFTERS)


def test_nothing_in_the_core_imports_the_conformance_suite() -> None:
    for path in CORE.values():
        assert not [found for found in imports_of(path) if inside(found, "treeflash.testing")]


def test_the_core_reaches_backends_through_the_registry_alone() -> None:
    backends = ("treeflash.reference", "treeflash_cuda", "treeflash_mlx")
    for name in CORE.keys() - REFERENCE.keys():
        for found in imports_of(CORE[name]):
            assert not any(inside(found, backend) for backend in backends), name


def test_the_reference_imports_what_backends_may() -> None:
    check_backend("treeflash.reference", REFERENCE)


@pytest.mark.parametrize("package", ["treeflash_cuda", "treeflash_mlx"])
def test_backends_import_data_types_and_interfaces_alone(package: str) -> None:
    """Neither the decode loop, nor another backend."""
    check_backend(package, backend_modules(package))


def check_backend(package: str, modules: dict[str, Path]) -> None:
    for name, path in modules.items():
        trains = inside(name, f"{package}.training")
        allowed = FOR_TRAINING if trains else FOR_BACKENDS
        for found in imports_of(path):
            if found in ALL and not inside(found, package):
                assert any(inside(found, f"treeflash.{part}") for part in allowed), (
                    f"{name} imports {found}"
                )
            if found.startswith("treeflash_"):
                assert inside(found, package), f"{name} imports {found}"
