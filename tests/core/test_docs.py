"""What the documentation names exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from treeflash.hub.published import BUNDLED_DRAFTER, PUBLISHED_DRAFTERS

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/training.md")
]
PACKAGES = ("treeflash", "benchmarks")


def names(page: Path) -> set[str]:
    """What a page quotes as code, in text and tables alike."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return set(re.findall(r"`([^`]+)`", text))


def modules(page: Path) -> set[str]:
    """The modules that a page runs or imports."""
    text = page.read_text(encoding="utf-8")
    return set(re.findall(rf"(?:-m|from|import) ((?:{'|'.join(PACKAGES)})[\w.]*)", text))


def definitions() -> Iterator[str]:
    """Classes of the core as `Class`, their attributes and methods as `Class.name`."""
    for path in (ROOT / "treeflash").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                yield node.name
                for item in node.body:
                    if isinstance(item, ast.FunctionDef):
                        yield f"{node.name}.{item.name}"
                    elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        yield f"{node.name}.{item.target.id}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    tops = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir())
    paths = {name for name in names(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name)}
    files = {name for name in paths if "/" not in name and name.endswith(".py")}
    paths = {name for name in paths if name.startswith(tops)}
    assert paths, "no path was found"
    assert not [name for name in paths if not (ROOT / name).exists()]
    assert not [name for name in files if not any(ROOT.glob(f"*/**/{name}"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_exist(page):
    for name in modules(page):
        path = ROOT / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{page.name} names {name}"


def test_the_architecture_names_every_package():
    found = names(ARCHITECTURE)
    for path in (ROOT / "treeflash").iterdir():
        if path.name.startswith("_") or not (path.is_dir() or path.suffix == ".py"):
            continue
        name = f"treeflash/{path.name}" + "/" * path.is_dir()
        assert name in found, f"docs/architecture.md lacks {name}"


def test_the_architecture_names_classes_and_methods_as_they_are():
    page = ARCHITECTURE.read_text(encoding="utf-8")
    known = set(definitions())
    found = set(re.findall(r"\b([A-Z]\w+\.[a-z]\w*)\b", page))
    assert found, "no method was found"
    assert found <= known, f"docs/architecture.md names {sorted(found - known)}"


def test_the_readme_counts_the_families_of_the_list():
    families = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    counts = re.findall(r"^- `(?:cuda|mlx)`, .*: (\d+) verified", families, flags=re.MULTILINE)
    rows = re.findall(r"^\| \S+ \| (\S+) \| (\S+) \|$", families, flags=re.MULTILINE)
    assert counts == [str(column.count("verified")) for column in zip(*rows, strict=True)]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"(\d+) model types of", readme) == counts


def test_the_drafters_of_the_table_are_documented():
    page = (ROOT / "docs" / "drafters.md").read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if row.startswith("| ")]
    names = [drafter.name for drafters in PUBLISHED_DRAFTERS.values() for drafter in drafters]
    for name in names:
        if name != BUNDLED_DRAFTER:
            found = rf"(?:^|[ ,]){re.escape(name)}(?:,|$| \|)"
            assert any(re.search(found, row) for row in rows), name
