"""The benchmarks that need no framework run on the tiny pair, and the page shows their results."""

import json
import os
from pathlib import Path

import pytest

from treeflash.config import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
PROMPTS = ["The sea is", "Why", "A list of cities:", "One and one is"]
SHORT = ["--limit", "2", "--max-tokens", "6"]
SCRIPTS = {
    "decoding.methods": [*SHORT, "--budgets", "4,auto"],
    "decoding.budgets": [*SHORT, "--budgets", "4", "--rounds", "2"],
    "decoding.half_precision": [
        *(*SHORT, "--budgets", "4", "--dtypes", "float32", "--parallel", "2")
    ],
    "decoding.memory": ["--sequences", "2", "--max-tokens", "6", "--lengths", "10"],
    "peers.__main__": [*SHORT, "--concurrency", "1,2", "--methods", ",".join(METHODS)],
}


@pytest.fixture
def sets(tmp_path):
    """Two files of four prompts."""
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        lines = [json.dumps({"id": n, "turns": [text]}) for n, text in enumerate(PROMPTS)]
        file.write_text("\n".join(lines))
    return [str(file) for file in files]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_runs(name, module, sets, pair_options, tmp_path):
    file = tmp_path / "out.json"
    files = sets[:1] if name == "decoding.memory" else sets
    if name == "peers.__main__":
        pair_options = [x.replace("--backend", "--backends") for x in pair_options]
    assert module(name).main([*files, *pair_options, *SCRIPTS[name], "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert {"date", "revision", "cpu", "versions"} <= results["machine"].keys()
    if name == "peers.__main__":
        rows = [row for row in results["rows"] if row["set"] != "mean"]
        assert {row["concurrency"] for row in rows} == {1, 2}
        assert all(row["equal"] == row["prompts"] == 2 for row in rows)
        assert all(row["ratio_to_one"] == 1 for row in rows if row["concurrency"] == 1)
        assert all(row["ratio_to_ar"] == 1 for row in rows if row["method"] == "ar")


def test_calls_take_turns_and_the_first_round_warms_up(module, monkeypatch):
    common, made, now = module("common"), [], [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        made.append(name)
        now[0] += seconds if len(made) > 2 else 100.0

    calls = [lambda: call("a", 1.0), lambda: call("b", 2.0)]
    assert common.alternate_ms(calls, 2) == [1000.0, 2000.0]
    assert "".join(made) == "ababab"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("decoding.methods", ["--methods", "ar,foo"], "argument --methods: 'foo' is unknown"),
        ("decoding.methods", ["--budgets", "0"], "--budgets: must be auto, or from 1 to 1024"),
        ("peers.__main__", ["--concurrency", "2.5"], "argument --concurrency: '2.5' is not an"),
        ("peers.__main__", ["--concurrency", "3"], "a has 4 prompts, but 6 are needed for groups"),
        ("decoding.memory", ["--json", "/"], "argument --json: cannot write /"),
        ("performance", ["--only", "systems"], "no other system has the backend 'reference'"),
    ],
)
def test_bad_input_is_one_line(name, options, message, module, sets, pair_options, capsys):
    if name == "peers.__main__":
        pair_options = [x.replace("--backend", "--backends") for x in pair_options]
    assert module(name).main([sets[0], *pair_options, *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def crash(part):
    part.add("rows", n=1)
    os.abort()


def test_a_part_that_crashes_or_hangs_loses_no_other(module, tmp_path, capsys):
    reports, path = module("report"), tmp_path / "report.json"
    report = reports.Report("test", path, {"device": "fake"}, 600)
    report.run("first", crash)
    report.grace = -600
    report.run("second", crash)
    assert report.close() == reports.PROBLEMS
    found = json.loads(path.read_text())
    assert found["parts"][0]["tables"] == {"rows": [{"n": 1}]}
    assert found["problems"] == [
        "first: its process ended with signal SIGABRT",
        "second: it did not end in time",
    ]
    assert "2 problem(s)" in capsys.readouterr().out


def test_budgets_of_sets_that_were_measured_are_kept(module, sets, pair_options, tmp_path):
    file = tmp_path / "out.json"
    options = [*pair_options, *SHORT, "--budgets", "4", "--rounds", "1", "--json", str(file)]
    run = module("decoding.budgets").main
    assert run([sets[0], *options]) == 0
    results = json.loads(file.read_text())
    results["rows"][0]["plain"] = 1.5
    file.write_text(json.dumps(results))
    assert run([*sets, *options]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["set"] for row in rows] == ["a", "b"]
    assert rows[0]["plain"] == 1.5
    assert run([*sets, *options, "--seed", "7"]) == 0
    assert json.loads(file.read_text())["rows"][0]["plain"] != 1.5


# Seconds, for every section of a page that is measured seldom.
@pytest.mark.nightly
def test_the_page_is_measured_and_written(module, sets, pair_options, tmp_path):
    performance = module("performance")
    page = tmp_path / "performance.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    options = [*sets, *pair_options, "--dtype", "float32", "--few", "1", "--max-tokens", "8"]
    options += ["--budgets", "4", "--concurrency", "1,2", "--memory-tokens", "4"]
    measured = ["methods", "budgets-float32", "throughput", "iteration", "memory"]
    options += ["--only", ",".join(measured)]
    assert performance.main(options, page, tmp_path / "parts") == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("python -m benchmarks.") >= len(measured)
    assert text.count("Not measured yet.") == len(performance.SECTIONS) - len(measured)
    assert "| treeflash-chain | 4 |" in text


def test_the_page_shows_the_results_beside_it(module):
    performance = module("performance")
    text = PAGE.read_text(encoding="utf-8")
    assert performance.render(text, performance.read_results()) == text
