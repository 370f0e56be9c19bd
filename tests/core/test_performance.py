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
    if "throughput" in found:
        shown |= module("throughput.section").blocks(found)
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
    assert runs.keys() == found.keys() | set(performance.THROUGHPUT)
    for name, command in runs.items():
        assert ("cuda:1" in command) == (name not in performance.ON_MLX)


def test_every_measurement_has_a_module_that_takes_its_options(module):
    performance = module("performance")
    args = performance.parser().parse_args(["a.jsonl", "--device", "cpu"])
    for name, *options in performance.commands(args, Path("random"), Path("4bit")).values():
        script = module(f"{name}.__main__" if name in ("peers", "throughput") else name)
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


def throughput_row(concurrency, system, method, **ratios):
    figures = dict.fromkeys(("ratio_to_ar", "ratio_to_padded", "ratio_to_one"), 1.0) | ratios
    return {
        "set": "mean",
        "concurrency": concurrency,
        "system": system,
        "method": method,
        "tokens_per_s": 50.0,
        "first_token_s": 0.25,
        "first_token_p95_s": 0.5,
        **figures,
        "prompts": 8,
        "equal": 8,
    }


@pytest.fixture
def throughput():
    """Results of the throughput benchmark."""
    prefix = {"method": "treeflash", "prompt_tokens": 2000, "cached_tokens": 1900}
    return {
        "backend": "cuda",
        "dtype": "bfloat16",
        "rows": [
            throughput_row(1, "transformers", "generate", ratio_to_ar=0.5),
            throughput_row(1, "treeflash", "treeflash", ratio_to_ar=1.5),
            throughput_row(2, "treeflash", "treeflash", ratio_to_ar=1.25),
            throughput_row(4, "treeflash", "treeflash", ratio_to_ar=1.125),
            throughput_row(8, "treeflash", "treeflash", ratio_to_one=2.5, ratio_to_padded=1.75),
        ],
        "skipped": [{"system": "transformers", "method": "generate_batch", "reason": "no"}],
        "prefix": prefix
        | {"first_token_s": 2.0, "cached_first_token_s": 0.25, "cached_to_whole": 0.125},
    }


def test_the_page_gets_the_section_on_throughput_once_it_was_measured(
    module, found, throughput, tmp_path, monkeypatch
):
    performance = module("performance")
    page = tmp_path / "performance.md"
    text = re.sub(  # without the section, if it was measured
        r"## Throughput\n.*?(?=## Budgets\n)",
        "",
        (DOCS / "performance.md").read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    page.write_text(text, encoding="utf-8")
    monkeypatch.setattr(performance, "PAGE", page)
    others = {name: x for name, x in found.items() if name not in performance.THROUGHPUT}
    performance.write_page(others)
    assert page.read_text(encoding="utf-8") == text
    performance.write_page(others | {"throughput": throughput})
    written = page.read_text(encoding="utf-8")
    before, _, rest = written.partition("## Throughput\n")
    own, heading, after = rest.partition("## Budgets\n")
    assert before + heading + after == text
    assert "| cuda | bfloat16 | 8 | treeflash | treeflash | 50.00 | 1.00 | 1.75 | 2.50 |" in own
    assert "| cuda | bfloat16 | transformers | generate_batch | no |" in own
    assert "| cuda | bfloat16 | treeflash | 2000 | 1900 | 2.00 | 0.25 | 0.12 |" in own
    both = others | {"throughput": throughput, "throughput-mlx": throughput | {"backend": "mlx"}}
    performance.write_page(both)
    again = page.read_text(encoding="utf-8")
    assert again.count("## Throughput") == 1
    assert "| mlx | bfloat16 | 8 | treeflash | treeflash | 50.00 |" in again


def test_the_goals_of_throughput(module, throughput):
    rows = module("throughput.section").goal_rows(throughput)
    assert [row["measured"] for row in rows] == ["1.00", "1.12", "2.50", "1.75", "0.12"]
    throughput["rows"] = throughput["rows"][:3]
    rows = module("throughput.section").goal_rows(throughput)
    assert [row["measured"] for row in rows[1:4]] == ["not measured"] * 3
