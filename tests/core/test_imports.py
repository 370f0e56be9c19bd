"""Imports point one way, and the core knows no framework."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import FRAMEWORKS, WITHOUT_FRAMEWORKS

import treeflash
from treeflash.command import COMMANDS

# The packages and modules of `treeflash`, lowest layer first: each imports only from lower layers.
LAYERS = [
    {"errors", "interruption", "processors"},
    {"option"},
    {"config", "low_bits"},
    {"low_bit_formats"},
    {"drafters"},
    {"decoding"},
    {"hub"},
    {"text"},
    {"registry"},
    {"language_model"},
    {"cli"},
    {"evaluation", "diagnosis", "training", "serving", "transformers"},
    {"commands"},
    {"command"},
    {"__main__"},
    {*COMMANDS} - {"drafters"},  # modules that only run a command
]
# What a backend may import besides its own modules: neither the loop nor the scheduler.
FOR_BACKENDS = {
    "errors",
    "config",
    "processors",
    "low_bits",
    "low_bit_formats",
    "drafters",
    *(f"decoding.{name}" for name in ("interfaces", "backend_base", "tree", "transitions")),
    *(f"decoding.{name}" for name in ("sampling", "hybrid", "families", "session")),
    *(f"decoding.{name}" for name in ("probe", "passed_checks", "threads", "mtp_head")),
    *(f"decoding.{name}" for name in ("logit_tables", "output_stage", "recurrent_head")),
    *(f"decoding.{name}" for name in ("images", "image_processor")),
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
THIRD_PARTY = Path(__file__).parents[1] / "conformance" / "third_party"
ALL = modules_of("treeflash", ROOT)


@cache
def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path} has a relative import"
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:  # `from package import module` imports the module
                module = f"{node.module}.{alias.name}"
                found.add(module if module in ALL else node.module)
    return found


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
    """The output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def layer_of(name: str) -> int:
    """The index of the layer that a module belongs to."""
    (found,) = (i for i, layer in enumerate(LAYERS) if name.split(".")[0] in layer)
    return found


def test_the_files_are_found():
    """The tests below would pass if no files were found."""
    assert "treeflash.reference.target" in REFERENCE
    assert "treeflash.config" in imports_of(ROOT / "decoding" / "loop.py")


def test_importing_all_of_the_core_brings_no_framework():
    names = [name for name in CORE if not name.endswith("__main__")]
    if find_spec("fastapi") is None:  # the extra `serve` is not installed
        names = [name for name in names if not inside(name, "treeflash.serving")]
    if find_spec("llguidance") is None:  # also of the extra `serve`
        names = [name for name in names if not name.startswith("treeflash.text.grammar")]
    if find_spec("ray") is None:  # the extra `ray`
        names = [name for name in names if name != "treeflash.serving.ray_app"]
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


def test_the_core_generates_where_no_framework_is_installed(pair_options):
    code = f"""
from importlib.util import find_spec
{WITHOUT_FRAMEWORKS}
assert not any(map(find_spec, {FRAMEWORKS}))
from treeflash.__main__ import main

raise SystemExit(main(["generate", "Hi", *{pair_options}, "--max-tokens", "4"]))
"""
    assert run(code)


def test_core_files_name_no_framework():
    """Functions import none either: backends are reached through the registry."""
    for name, path in CORE.items():
        found = {module.split(".")[0] for module in imports_of(path)}
        assert not found & FRAMEWORKS, name


def test_no_module_imports_itself_in_a_circle():
    """Raises CycleError, which names the circle."""
    graph = {
        name: {found for found in imports_of(path) if found in ALL and found != name}
        for name, path in ALL.items()
        if name != "treeflash.testing"  # the package gathers its modules
    }
    TopologicalSorter(graph).prepare()


def test_packages_import_downwards():
    """Every module imports from its own package or from packages of lower layers."""
    assert "treeflash.decoding.loop" in CORE
    assert "treeflash.decoding.interfaces" in imports_of(CORE["treeflash.decoding.loop"])
    for name, path in CORE.items():
        if name in REFERENCE or name == "treeflash":
            continue
        own = name.removeprefix("treeflash.")
        for found in imports_of(path):
            if found in ALL and found.startswith("treeflash."):
                other = found.removeprefix("treeflash.")
                if other.split(".")[0] != own.split(".")[0]:
                    assert layer_of(other) < layer_of(own), f"{name} imports {found}"


def test_nothing_in_the_core_imports_the_conformance_suite():
    for path in CORE.values():
        assert not [found for found in imports_of(path) if inside(found, "treeflash.testing")]


def test_the_extra_testing_has_what_the_conformance_suite_imports():
    toml = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(toml)["project"]

    def packages(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", text)[0].replace("-", "_") for text in requirements}

    suite = [path for name, path in ALL.items() if inside(name, "treeflash.testing")]
    imported = {found.split(".")[0] for path in suite for found in imports_of(path)}
    additional = imported - sys.stdlib_module_names - packages(project["dependencies"])
    assert additional - {"treeflash"} == packages(project["optional-dependencies"]["testing"])


def test_the_core_reaches_backends_through_the_registry_alone():
    backends = ("treeflash.reference", "treeflash_cuda", "treeflash_mlx")
    others = CORE.keys() - REFERENCE.keys()
    found = {name: imports_of(CORE[name]) for name in others}
    assert "treeflash.decoding.interfaces" in found["treeflash.decoding.scheduler"]
    for name, imported in found.items():
        assert not any(inside(x, backend) for x in imported for backend in backends), name


def test_the_reference_imports_what_backends_may():
    check_backend("treeflash.reference", REFERENCE)


@pytest.mark.parametrize("package", ["treeflash_cuda", "treeflash_mlx"])
def test_backends_import_data_types_and_interfaces_alone(package):
    """Neither the decode loop, nor another backend."""
    check_backend(package, backend_modules(package))


@pytest.mark.parametrize(
    ("folder", "others"),
    [("cpu", ("gpu", "hf")), ("gpu", ("cpu", "hf")), ("decoder", ("cpu", "gpu", "hf"))],
    ids=["cpu", "gpu", "decoder"],
)
def test_folders_import_none_of_another_device(folder, others):
    modules = backend_modules("treeflash_cuda")
    own = {name: path for name, path in modules.items() if inside(name, f"treeflash_cuda.{folder}")}
    assert len(own) > 1
    for name, path in own.items():
        for found in imports_of(path):
            assert not any(inside(found, f"treeflash_cuda.{other}") for other in others), (
                f"{name} imports {found}"
            )


def test_the_example_of_a_third_party_imports_what_backends_may():
    """The module of its entry point, and all that this module imports."""
    project = tomllib.loads((THIRD_PARTY / "pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"]["treeflash.backends"].values()
    package = entry.split(".")[0]
    modules = modules_of(package, THIRD_PARTY / package)
    assert entry.split(":")[0] in modules
    check_backend(package, modules)


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
