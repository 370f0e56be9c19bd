"""The command line `treeflash evaluate`."""

import json
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
from byte_tokens import save_tokenizer
from failures import failing
from mtp_pairs import write_mtp_pair

from treeflash.commands.evaluate import main
from treeflash.errors import NumericalError
from treeflash.evaluation.run import METRICS

ROW = ["set", "method", "budget", "block_efficiency", "low", "high", "prompts", "tokens"]
RATIO = ["set", "method", "baseline", "budget", "ratio", "low", "high"]
LOST = ["set", "method", "budget", "candidate", "child", "budget_limit", "block"]
DEPTH = ["set", "depth", "anchors"] + [
    f"{figure}_{source}" for figure in METRICS for source in ("marginal", "corrected")
]


@pytest.fixture
def run(prompt_sets, capsys):
    """Run the command line on both sets: exit code, standard output, standard error."""

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["--prompts", *prompt_sets, "--limit", "2", "--max-tokens", "9", *args])
        return code, *capsys.readouterr()

    return run


def test_the_names_that_scripts_rely_on(use, run, model, tmp_path):
    use(model)
    path = tmp_path / "out.json"
    code, out, err = run(
        "--methods", "ar, dflash,ddtree,treeflash", "--budgets", "16, 4", "--output", str(path)
    )
    found = json.loads(path.read_text(encoding="utf-8"))
    assert code == 0
    assert [
        list(record) for record in (found[k][0] for k in ("rows", "ratios", "depths", "lost"))
    ] == [ROW, RATIO, DEPTH, LOST]
    wanted = [
        ("ar", 1),
        ("dflash", 16),
        ("ddtree", 4),
        ("ddtree", 16),
        ("treeflash", 4),
        ("treeflash", 16),
    ]
    assert [(row["set"], row["method"], row["budget"]) for row in found["rows"]] == [
        (name, *case) for name in ("one", "two", "mean") for case in wanted
    ]
    assert [row["prompts"] for row in found["rows"]] == [2] * 12 + [4] * 6
    assert [row["tokens"] for row in found["rows"]] == [18] * 12 + [36] * 6
    assert [(row["set"], row["baseline"], row["budget"]) for row in found["ratios"]] == [
        (name, *baseline)
        for name in ("one", "two", "mean")
        for baseline in (("ddtree", 4), ("ddtree", 16), ("dflash", 16))
    ]
    assert {(row["method"], row["budget"]) for row in found["branches"]} == set(wanted[1:])
    assert [(row["set"], row["depth"]) for row in found["depths"]] == [
        (name, depth) for name in ("one", "two", "mean") for depth in range(1, 6)
    ]
    assert list(found["prompts"][0]) == ["set", "id", "method", "budget", "tokens", "iterations"]
    assert [(x["set"], x["id"], x["method"], x["budget"]) for x in found["prompts"]] == [
        (name, number, *case) for name in ("one", "two") for number in (0, 1) for case in wanted
    ]
    for row in found["rows"][:12]:
        parts = [x for x in found["prompts"] if all(x[k] == row[k] for k in ROW[:3])]
        tokens, iterations = (sum(x[key] for x in parts) for key in ("tokens", "iterations"))
        assert (tokens, len(parts)) == (row["tokens"], row["prompts"])
        assert row["block_efficiency"] == pytest.approx((tokens - len(parts)) / iterations)
    assert (found["backend"], found["dtype"], found["max_tokens"]) == ("reference", "float32", 9)
    assert (found["head_vocab"], found["head_rows"]) == (1024, "auto")
    assert model.names.items() <= found.items()
    assert "Block efficiency" in out
    assert "Rejections" in out
    assert "4/4" in err


def test_by_default_a_head_that_drafts_depth_by_depth_drafts_trees_and_chains(run, tmp_path):
    target, head = write_mtp_pair(tmp_path, "eagle3", vocab_size=300)
    save_tokenizer(target)
    models = ["--backend", "reference", "--target", str(target), "--drafter", str(head)]
    path = tmp_path / "out.json"
    code, _, err = run(*models, "--budgets", "4", "--output", str(path))
    assert (code, err.count("error")) == (0, 0)
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {row["method"] for row in rows} == {"treeflash", "treeflash-chain"}


def test_temperature_and_seed_reach_the_target(use, run, model, tmp_path):
    use(model)
    path = tmp_path / "out.json"

    def rows(*args: str):
        assert run("--methods", "treeflash", "--budgets", "4", "--output", str(path), *args)[0] == 0
        return json.loads(path.read_text(encoding="utf-8"))["depths"]

    sampled = rows("--temperature", "1.5", "--seed", "1")
    assert sampled == rows("--temperature", "1.5", "--seed", "1")
    assert sampled != rows("--temperature", "1.5", "--seed", "2")


@pytest.mark.sample(1)
@pytest.mark.parametrize("option", ["--head-vocab", "--head-rows"])
def test_what_the_head_scores_reaches_the_trees(use, run, model, tmp_path, option):
    use(model)
    path = tmp_path / "out.json"
    lost = []
    for size in ("full", "1"):
        options = ("--methods", "treeflash", "--budgets", "16", "--max-tokens", "40")
        assert run(*options, option, size, "--output", str(path))[0] == 0
        lost.append(json.loads(path.read_text(encoding="utf-8"))["lost"])
    assert lost[0] != lost[1]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt, 130, "interrupted"),
        (NumericalError("not finite"), 2, "error: not finite"),
    ],
)
def test_an_early_end_keeps_what_was_measured(use, run, model, tmp_path, error, code, line):
    pytest.importorskip("matplotlib")
    use(model)
    path, report = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--methods", "dflash,treeflash", "--budgets", "8"]
    # Two methods and the depths: the eighth state is the third prompt's.
    with failing(model.backend, "open", error, call=8):
        done, out, err = run(*options, "--output", str(path), "--report", str(report))
    found = json.loads(path.read_text(encoding="utf-8"))
    assert done == code
    assert err.strip().splitlines()[-1] == line
    assert [(row["set"], row["prompts"]) for row in found["rows"][:2]] == [("one", 2)] * 2
    assert report.stat().st_size > 0
    assert "Block efficiency" in out


def test_an_end_before_the_first_prompt_overwrites_nothing(use, run, model, tmp_path):
    use(model)
    path = tmp_path / "out.json"
    path.write_text("before", encoding="utf-8")
    with failing(model.backend, "open", KeyboardInterrupt):
        assert run("--output", str(path))[0] == 130
    assert path.read_text(encoding="utf-8") == "before"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_loses_no_figures(use, run, model, tmp_path):
    """The tables are printed first, and a file that fails does not keep the other from disk."""
    pytest.importorskip("matplotlib")
    use(model)
    report = tmp_path / "out.png"
    code, out, err = run("--methods", "dflash", "--output", "/dev/full", "--report", str(report))
    assert code == 2
    assert "Block efficiency" in out
    assert err.splitlines()[-1] == "error: /dev/full cannot be written: No space left on device"
    assert report.stat().st_size > 0


def test_unless_methods_are_named_they_are_those_that_the_drafter_can(use, run, model, tmp_path):
    backend = copy(model.backend)
    backend.head = None
    use(replace(model, backend=backend))
    assert run("--output", str(tmp_path / "out.json"))[0] == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert {row["method"] for row in found["rows"]} == {"dflash", "ddtree"}


@pytest.mark.parametrize(
    ("text", "parts", "methods", "message"),
    [
        ("x", {"head": False}, ["--methods", "treeflash"], "has no AR head"),
        ("x", {"drafter": False}, [], "no drafter was loaded, which all default methods need"),
        ("", {"head": False}, ["--methods", "ar"], "every text ended with its first token"),
    ],
)
def test_what_cannot_be_measured(use, run, scripted, tmp_path, text, parts, methods, message):
    use(scripted(text, **parts))
    path = tmp_path / "out.json"
    code, out, err = run(*methods, "--output", str(path))
    assert (code, out, path.exists()) == (2, "", False)
    assert message in err.splitlines()[-1]
