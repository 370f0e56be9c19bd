"""The command line of the doctor, on a tiny random pair of the reference backend."""

from __future__ import annotations

import json

import pytest

from treeflash.doctor import main


@pytest.fixture
def run(tiny_pair, capsys):
    """Examine the pair: exit code, standard output, standard error."""

    def run(*args):
        target, drafter = tiny_pair
        options = ["--backend", "reference", "--target", str(target), "--drafter", str(drafter)]
        return main([*options, *args]), *capsys.readouterr()

    return run


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": 1, "prompt": "one"}, {"id": 2, "turns": ["two", "three"]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_report(run, prompts):
    code, out, _ = run("--prompts", prompts, "--max-tokens", "12")
    assert code == 1
    lines = out.splitlines()
    assert lines[0].startswith("agreement by depth: ")
    assert lines[1].startswith("with the AR head:   ")
    assert lines[2].startswith("problem  depths         the drafter's top token at depth 1 ")
    assert [line[9:23].strip() for line in lines[3:]] == [
        "block offset",
        "prompting",
        "target layers",
        "mask token",
    ]


def test_json(run, prompts):
    code, out, _ = run("--json", "--prompts", prompts, "--max-tokens", "12", "--thinking")
    found = json.loads(out)
    assert code == 1
    assert not found["ok"]
    assert len(found["marginal"]) == len(found["corrected"]) == 5
    assert found["findings"][0].keys() == {"check", "ok", "message"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-tokens", "0"], "max-tokens must be 1 or more, got 0"),
        (["--max-tokens", "1"], "too short to score a drafter"),
        (["--raw", "--thinking"], "not allowed with argument --raw"),
        (["--prompts", "nowhere"], "nowhere cannot be read"),
        (["--drafter", "nowhere/at/all"], "is not a folder"),
        (["--max-depth"], "unrecognized arguments"),
    ],
)
def test_bad_input(run, args, message):
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
