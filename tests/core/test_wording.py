"""Words that were replaced by the field's usual ones do not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("treeflash", "backends", "benchmarks", "docs", "tests")
KINDS = (".py", ".md", ".toml")
WORDS = {
    "pace": "adaptive budget",
    "walks": "replay",
    "race": "comparison",
    "one_text": "forced text",
    "spelling": "config compatibility",
    "spellings": "forms",
    "looking": "attention context",
    "visibility": "attention mask",
    "DEAREST": "largest size",
    "DOUBT": "prior weight",
    "HICCUP": "outlier factor",
    "why_lost": "rejection reason",
    "measure_depths": "depth metrics",
    "DepthTotals": "depth metrics",
    "Agreement": "drafter scores",
    "train_config": "training.config",
}
PHRASES = (
    "What one target forward brought",
    "How sure a figure is",
    "How many nodes to verify, and whether to draft at all",
    "positions turn faster beyond a length",
    "goes on from",
    "goes on with",
    ": likewise",
    "; likewise",
    "bad input is one line",
    "answers of other engines do too",
    "start from nothing",
    "not at hand",
    "share of the steps",
    "is no variable of",
    "nothing is clearly better",
    "the true tokens are",
    "that no DFlash or TreeFlash drafter",
    "finished by",
    '"of sampling"',
    '"the highest"',
)


def pages() -> list[Path]:
    """Everything that is written for people, without this file."""
    found = [path for name in FOLDERS for path in (ROOT / name).rglob("*")]
    found += ROOT.iterdir()
    return [p for p in found if p.suffix in KINDS and p.is_file() and p != Path(__file__)]


def prose(path: Path) -> str:
    """The text of a file in one line; literals and comments that continue are joined."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'"\n\s*f?"', "", text)
    return re.sub(r"\s+(# )?", " ", text)


def uses(pattern: str, flags: int = 0) -> list[str]:
    """The files that have a pattern."""
    matches = re.compile(pattern, flags).search
    return [str(path.relative_to(ROOT)) for path in pages() if matches(prose(path))]


def test_the_files_are_found():
    """And what is looked for in them would be found."""
    names = {str(path.relative_to(ROOT)) for path in pages()}
    assert {"README.md", "pyproject.toml", "treeflash/decoding/loop.py"} <= names
    assert "docs/architecture.md" in uses(r"\bone forward\s+pass\b")


@pytest.mark.parametrize("word", WORDS)
def test_names(word):
    found = uses(rf"(?<![\w-]){re.escape(word)}(?!\w)")
    assert not found, f"{word!r} is now called {WORDS[word]!r}"


@pytest.mark.parametrize("phrase", PHRASES)
def test_phrases(phrase):
    assert not uses(re.escape(phrase), re.IGNORECASE)
