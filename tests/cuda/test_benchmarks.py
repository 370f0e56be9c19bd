"""The benchmarks that need PyTorch run, on tiny models and the CPU."""

from __future__ import annotations

import json

import pytest
from endless_pair import endless_pair

from treeflash.config import DecodeConfig
from treeflash.testing import require

require("torch")

SHORT = ["--limit", "1", "--max-tokens", "4"]
ABLATION = ["--steps", "2", "--answers", "12", "--seeds", "0", "--cells", "base"]
SCRIPTS = {
    "training_cost": ["--shape", "tiny", "--length", "64", "--anchors", "32"],
}
PAIR_SCRIPTS = {
    "peers.__main__": ["--systems", "transformers,treeflash", "--backends", "cuda"],
    "throughput": ["--backend", "cuda", "--concurrency", "1,2"],
}


@pytest.fixture
def pair(tmp_path):
    """Options that choose a tiny pair on the CPU, and a prompt set."""
    prompts = tmp_path / "a.jsonl"
    prompts.write_text("\n".join(json.dumps({"id": n, "turns": [f"Why {n}"]}) for n in range(2)))
    return [str(prompts), *endless_pair(tmp_path), "--device", "cpu", "--dtype", "float32"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_runs(name, module, tmp_path):
    file = tmp_path / "out.json"
    assert module(name).main([*SCRIPTS[name], "--json", str(file)]) == 0
    assert "machine" in json.loads(file.read_text())


# Seconds, for scripts of benchmarks that change seldom.
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["throughput", "peers.__main__"])
def test_a_comparison_runs(name, module, pair, tmp_path):
    """All systems run, and in float32 they give the same tokens."""
    file = tmp_path / "out.json"
    if name == "peers.__main__":
        pair = [*pair, "--environments", str(tmp_path / "environments"), "--threads", "1"]
    assert module(name).main([*pair, *SHORT, *PAIR_SCRIPTS[name], "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    rows = [row for row in results["rows"] if row["set"] == "a"]
    assert {row["system"] for row in rows} == {"treeflash", "transformers"}
    assert all(row["equal"] == row["prompts"] > 0 for row in rows)
    assert {row["method"] for row in results["skipped"]} <= {"assisted"}
    assert results["device"] == "cpu"


# Seconds, for a figure that nothing else uses.
@pytest.mark.nightly
def test_the_speed_of_exact_mode_is_measured(module, pair, tmp_path):
    """In one run with the comparison of its texts."""
    file = tmp_path / "out.json"
    options = ["--speed", "--dtypes", "bfloat16", "--parallel", "1,2", "--limit", "2"]
    options += ["--exact", "--methods", "treeflash", "--budgets", "4", "--temperatures", "0"]
    options += ["--max-tokens", "4", "--json", str(file)]
    assert module("decoding.half_precision").main([*pair, *options]) == 0
    results = json.loads(file.read_text())
    assert [(row["parallel"], row["differ"]) for row in results["rows"]] == [(1, 0), (2, 0)]
    rows = results["speeds"]
    assert {(row["set"], row["method"], row["parallel"]) for row in rows} == {
        (name, method, parallel)
        for name in ("a", "mean")
        for method in ("ar", "treeflash")
        for parallel in (1, 2)
    }
    assert all(row["ratio"] > 0 for row in rows)


# Seconds, for scripts of benchmarks that change seldom.
@pytest.mark.nightly
def test_the_ablation_resumes(module, tmp_path, capsys, monkeypatch):
    require("accelerate")
    ablation = module("ablation")
    options = ["--output", str(tmp_path / "out.jsonl"), *ABLATION, "--limit", "2"]
    options += ["--max-tokens", "9"]
    configs = []

    def recorded(**settings):
        configs.append(DecodeConfig(**settings))
        return configs[-1]

    monkeypatch.setattr(ablation, "DecodeConfig", recorded)
    assert ablation.main(options) == 0
    assert {config.method for config in configs} == {"ar", "treeflash", "treeflash-chain"}
    assert not any(config.copies for config in configs), "the drafter is measured alone"
    shown = capsys.readouterr().out
    assert shown.startswith("| choice | value | seeds | chain, greedy | tree, greedy |")
    monkeypatch.setattr(ablation, "measure", None)
    assert ablation.main(options) == 0
    assert capsys.readouterr().out == shown
