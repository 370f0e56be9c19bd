"""The comparison with other systems: rows, reasons, and a peer that needs no framework."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

WORKERS = Path(__file__).parents[2] / "benchmarks" / "peers" / "workers"
WORKER = """
import os
from serve import about, answer, serve

def load(setup):
    if setup["target"] is None:
        raise ValueError("no such\\nmodel")

    def decode(prompt_ids, method, budget, max_tokens):
        print("libraries print")
        os.write(1, b"and so does C\\n")
        if method == "fails":
            raise RuntimeError("cannot do that")
        if method == "dies":
            raise SystemExit("out of luck")
        return answer(prompt_ids[:max_tokens], max_tokens - 1, 1, 0.5)

    methods = ["generate", "fails", "dies"]
    return about(methods, "cpu", "torch.float32", ("numpy",), {"assisted": "no assistant"}), decode

serve(load)
"""


@pytest.fixture
def start(module, tmp_path, monkeypatch):
    """A process that runs the worker above."""
    peer = module("peers.system")
    monkeypatch.setenv("PYTHONPATH", str(WORKERS))
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    system = peer.System(name="transformers", backend="cuda", worker=str(script))
    started = []

    def start(target: str | None = "target"):
        one = peer.Peer(system, sys.executable, {"target": target}, 1, tmp_path / "log")
        started.append(one)
        return one

    yield start
    for one in started:
        one.close()


def record(system, method, set_name, prompt, tokens, seconds, *, forwards=1, token_ids=(1, 2)):
    return {
        "system": system,
        "method": method,
        "budget": None,
        "backend": "cuda",
        "dtype": "float32",
        "set": set_name,
        "prompt": prompt,
        "tokens": tokens,
        "forwards": forwards,
        "seconds": seconds,
        "token_ids": list(token_ids),
    }


def test_rows(module):
    rows = module("peers.figures").rows(
        [
            record("transformers", "generate", "a", 0, 10, 1.0, forwards=10),
            record("dflash", "dflash", "a", 0, 10, 0.5, forwards=5),
            record("transformers", "generate", "a", 1, 10, 1.0, forwards=10),
            record("dflash", "dflash", "a", 1, 10, 0.25, forwards=5, token_ids=[3]),
            record("transformers", "generate", "a", 2, 0, 0.0, forwards=0),
            record("dflash", "dflash", "a", 2, 0, 0.0, forwards=0),
            record("transformers", "generate", "b", 0, 10, 2.0, forwards=10),
            record("dflash", "dflash", "b", 0, 10, 2.0, forwards=4),
        ]
    )
    assert [(row["system"], row["set"]) for row in rows] == [
        ("transformers", "a"),
        ("dflash", "a"),
        ("transformers", "b"),
        ("dflash", "b"),
        ("transformers", "mean"),
        ("dflash", "mean"),
    ]
    assert [row["ratio_to_generate"] for row in rows] == [1, 3, 1, 1, 1, 2]
    assert rows[1]["block_efficiency"] == 2
    assert rows[1]["tokens_per_s"] == pytest.approx(20 / 0.75)
    assert [(row["equal"], row["prompts"]) for row in rows[1::2]] == [(1, 2), (1, 1), (2, 3)]
    assert rows[-1]["block_efficiency"] == 2.25


def test_no_ratio_without_generate(module):
    rows = module("peers.figures").rows([record("dflash", "dflash", "a", 0, 10, 0.5)])
    assert [(row["set"], row["ratio_to_generate"]) for row in rows] == [("a", None)]


def test_a_comparison_drops_the_cases_that_fail(module, start):
    comparison = module("peers.comparison").Comparison()
    comparison.add(start(), [16])
    comparison.run("a", 0, [5, 6, 7], 2)
    assert [case.method for case in comparison.cases] == ["generate"]
    (found,) = comparison.records
    assert found["token_ids"] == [5, 6]
    assert (found["dtype"], found["set"], found["tokens"]) == ("float32", "a", 1)
    assert {skip["method"]: skip["reason"] for skip in comparison.skipped} == {
        "assisted": "no assistant",
        "fails": "RuntimeError: cannot do that",
        "dies": "its process ended with exit code 1: out of luck",
    }


def test_what_warms_up_does_not_count(module, start):
    comparison = module("peers.comparison").Comparison()
    comparison.add(start(), [16])
    comparison.cases = comparison.cases[:1]
    comparison.warm_up([5, 6, 7], 2)
    assert len(comparison.cases) == 1
    assert not comparison.records


def test_reason_of_a_failed_load(module, start):
    with pytest.raises(module("peers.system").PeerError, match=r"^ValueError: no such model$"):
        start(None)


def test_budgets_are_of_trees_alone(module):
    peer, comparison = module("peers.system"), module("peers.comparison").Comparison()
    one = object.__new__(peer.Peer)
    one.system = next(system for system in peer.SYSTEMS if system.name == "treeflash")
    one.about = {"methods": ["ar", "ddtree"], "skipped": {}}
    comparison.add(one, [16, "auto"])
    cases = [(case.method, case.budget) for case in comparison.cases]
    assert cases == [("ar", None), ("ddtree", 16), ("ddtree", "auto")]


def test_environment_is_made_once(module, tmp_path):
    peer = module("peers.system")
    system = peer.SYSTEMS[0]
    with pytest.raises(peer.PeerError, match="not installed in"):
        peer.interpreter(system, tmp_path, install=False)
    folder = tmp_path / system.name
    folder.mkdir()
    done = folder / "installed.txt"
    done.write_text("\n".join(system.requirements))
    assert Path(peer.interpreter(system, tmp_path, install=True)).is_relative_to(folder)
    assert done.is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--systems", "vllm"], "--systems has no 'vllm'; choose from transformers, dflash,"),
        (["--backends", "metal"], "--backends has no 'metal'; choose from cuda, mlx"),
        (["--budgets", "16,many"], "budget must be auto, or from 1 to 1024 nodes, got 'many'"),
    ],
)
def test_bad_options(module, capsys, options, message):
    assert module("peers.__main__").main(["prompts.jsonl", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_unknown_set(module, tmp_path):
    peers = module("peers.__main__")
    with pytest.raises(ValueError, match="--sets has no 'b'; the files are a"):
        peers.read_sets([tmp_path / "a.jsonl"], ["b"], 1, None)
