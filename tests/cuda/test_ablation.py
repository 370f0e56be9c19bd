"""The ablation of training, at the smallest scale."""

import importlib
import json
from pathlib import Path

import pytest

from treeflash.testing import require

require("torch")

SMALL = ["--steps", "2", "--answers", "12", "--limit", "2", "--max-tokens", "9", "--seeds", "0"]


@pytest.fixture
def ablation(monkeypatch):
    """The module of a part of the ablation."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return lambda part: importlib.import_module(f"benchmarks.ablation.{part}")


@pytest.fixture
def run(ablation, tmp_path):
    """Run it with an output file; returns the exit status."""

    def run(*options):
        return ablation("__main__").main(["--output", str(tmp_path / "out.jsonl"), *options])

    return run


def test_a_cell_is_measured_once_and_shown(run, ablation, tmp_path, capsys, monkeypatch):
    assert run(*SMALL, "--cells", "base") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("| choice | value | seeds | chain, greedy | tree, greedy |")
    assert len(shown) == 3
    (record,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert record["cell"] == "base: kl, exponential, swiglu"
    for tokens, forwards in record["tree, temperature 1"]:
        assert 0 < forwards <= tokens < 9
    monkeypatch.setattr(ablation("__main__"), "measure", None)
    assert run(*SMALL, "--cells", "base") == 0
    assert capsys.readouterr().out.splitlines() == shown


def test_every_cell_is_a_valid_configuration_of_its_own(ablation):
    from dataclasses import replace

    cells, base = ablation("cells").CELLS, ablation("__main__").BASE
    configs = [replace(base, **cell.changes) for cell in cells]
    assert len({(str(config), cell.data) for config, cell in zip(configs, cells, strict=True)}) == (
        len(cells)
    )
    assert len({cell.name for cell in cells}) == len(cells)


def test_the_data_of_a_cell(ablation, tmp_path):
    setting = ablation("setting").Setting(
        target=tmp_path, greedy=[1, 2, 3, 4], sampled=[5, 6, 7, 8], prompts=[]
    )
    assert setting.answers("all") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert setting.answers("half") == [1, 2, 5, 6]
    assert setting.answers("quarter") == [1, 5]
    assert setting.answers("sampled") == [5, 6, 7, 8]


def test_a_figure_is_the_mean_over_seeds(ablation):
    table = ablation("table")
    cells = ablation("cells").CELLS
    figures = ablation("measure").figures()

    def record(seed, tokens):
        return {"cell": cells[1].name, "seed": seed} | dict.fromkeys(figures, [[tokens, 4]] * 3)

    *_, line = table.ablation_table([record(0, 8), record(1, 12)]).splitlines()
    assert line == "| loss | ce | 2 | " + " | ".join(["2.50 (2.50 to 2.50)"] * 4) + " |"


def test_options_of_another_target_go_together(run, capsys):
    assert run("--greedy", "answers.jsonl") == 2
    assert "--target, --greedy, --sampled and --prompts go together" in capsys.readouterr().err
