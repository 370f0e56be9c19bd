"""A backend in a separate package, written against public names alone, passes the suite."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "third_party"
PUBLIC = {"config", "drafters", "errors"} | {
    f"decoding.{name}" for name in ("backend_base", "interfaces", "logit_tables", "probe")
}


def test_example_uses_public_names_only():
    files = sorted((PACKAGE / "treeflash_example").glob("*.py"))
    imported = {
        node.module
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "treeflash"
    }
    assert imported
    for module in imported:
        assert any(f"{module}.".startswith(f"treeflash.{name}.") for name in PUBLIC), module


# Another process, for half a minute; `test_reference.py` runs the laws every time.
@pytest.mark.nightly
def test_example_passes_the_suite(tmp_path):
    install(tmp_path)
    options = ["-q", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(tmp_path), str(PACKAGE), *filter(None, map(str, sys.path))])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "check_example.py"],
        cwd=PACKAGE,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def install(folder):
    """Write the metadata that pip would; with its folder on the path, that is an installation.

    A real one would fetch a build backend, which the tests must not need.
    """
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    metadata = folder / f"treeflash_example-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups) + "\n")
