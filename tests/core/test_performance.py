"""docs/performance.md: its blocks, its measurements, and the rows of its tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from treeflash.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def found():
    """The results that the page shows."""
    folder = DOCS / "performance"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_the_page_shows_the_results_that_lie_beside_it(module, found):
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    shown = module("page").blocks(found)
    assert set(re.findall(r"<!-- ([\w-]+) -->", page)) - {"end"} == shown.keys()
    assert module("page").render(page, shown) == page


def test_a_page_without_a_mark_is_refused(module):
    page = module("page")
    assert page.render("a <!-- x -->\nold\n<!-- end --> b", {"x": "new"}) == (
        "a <!-- x -->\nnew\n<!-- end --> b"
    )
    with pytest.raises(ConfigError, match="no block y"):
        page.render("a <!-- x -->\nold\n<!-- end --> b", {"x": "new", "y": "more"})


def test_every_measurement_has_results_and_mlx_gets_no_device_of_torch(module, found):
    performance = module("performance")
    args = performance.parser().parse_args(["a.jsonl", "--device", "cuda:1"])
    runs = performance.commands(args, Path("random"), Path("quantised"))
    assert runs.keys() == found.keys()
    for name, command in runs.items():
        assert ("cuda:1" in command) == (name not in performance.ON_MLX)


def test_every_measurement_has_a_module_that_takes_its_options(module):
    performance = module("performance")
    args = performance.parser().parse_args(["a.jsonl", "--device", "cpu"])
    for name, *options in performance.commands(args, Path("random"), Path("4bit")).values():
        script = module("peers.__main__" if name == "peers" else name)
        script.parser().parse_args(options)


def test_auto_is_compared_with_the_fastest_fixed_budget(module):
    methods = module("decoding.methods")

    def runs(*seconds: float):
        return [SimpleNamespace(decode_s=s) for s in seconds]

    of = {
        methods.Case("ar", 64): runs(4.0, 4.0),
        methods.Case("ddtree", 8): runs(2.0, 2.0),
        methods.Case("ddtree", 64): runs(1.0, 5.0),
        methods.Case("ddtree", "auto"): runs(2.5, 2.5),
        methods.Case("treeflash", "auto"): runs(1.0, 1.0),
    }
    (row,) = methods.auto_rows("a", of)
    assert row == {
        "set": "a",
        "method": "ddtree",
        "best": 8,
        "auto_to_best": pytest.approx(0.8),
        "low": pytest.approx(0.8),
        "high": pytest.approx(0.8),
    }
