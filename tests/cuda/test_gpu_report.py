"""The parts of the report about a GPU, run on a CPU, where graphs and kernels disappoint."""

import json
import time
from argparse import Namespace
from functools import partial

import pytest
from failures import failing

from treeflash.testing import require

require("torch")

import torch

from treeflash.decoding.tree import accept


@pytest.fixture
def judge(module, monkeypatch):
    monkeypatch.setattr(module("gpu_report"), "TOKENS", 16)
    return module("gpu_report")


@pytest.fixture
def gpu(judge, tmp_path):
    args = Namespace(target=None, shape="tiny")
    return judge.Gpu(torch.device("cpu"), tmp_path, args, end=time.time() + 600)


@pytest.fixture
def run(module, judge, gpu):
    """Runs a part, and returns it."""

    def run_part(name):
        part = module("report").Part(name)
        module("report").find_here(part, partial(judge.PARTS[name], gpu))
        return part

    return run_part


def test_a_machine_without_a_gpu_is_told_why(judge, tmp_path, see_gpus, monkeypatch, capsys):
    see_gpus(0)
    monkeypatch.setattr(judge, "has_metal", lambda: False)
    path = tmp_path / "report.json"
    assert judge.main(["--json", str(path)]) == 2
    why = json.loads(path.read_text())["device"]["why"]
    assert "no CUDA device is available" in why
    assert why in capsys.readouterr().err


def test_a_mac_is_sent_to_its_own_benchmark(judge, see_gpus, monkeypatch, capsys):
    see_gpus(0)
    monkeypatch.setattr(judge, "has_metal", lambda: True)
    assert judge.main([]) == 0
    assert "python -m benchmarks.mac" in capsys.readouterr().out


def test_texts_that_agree_are_no_problem(run):
    part = run("texts")
    assert not part.error
    assert part.problems == []
    assert {row["dtype"] for row in part.tables["texts"]} == {
        *("float32", "float32, 8-bit KV cache", "float32, gated delta nets", "float32, Mamba-2"),
        *("exact bfloat16", "exact float16"),
    }
    assert all(row["equal_up_to"] == row["tokens"] == 16 for row in part.tables["texts"])


def test_a_wrong_text_is_a_problem_by_method(run, judge, monkeypatch):
    from treeflash.decoding import loop

    def accept_too_much(tree, sampled):
        right = accept(tree, sampled)
        return right if len(tree) == 1 else type(right)(right.path, (*right.tokens[:-1], 3))

    monkeypatch.setattr(loop, "accept", accept_too_much)
    monkeypatch.setattr(judge, "DTYPES", ())
    monkeypatch.setattr(judge, "VARIANTS", {"float32": ("qwen3", {})})
    monkeypatch.setattr(judge, "METHODS", ("treeflash",))
    part = run("texts")
    assert any(line.startswith("treeflash, greedy, in float32 differs") for line in part.problems)


def test_without_graphs_every_function_is_a_problem(run):
    part = run("graphs")
    assert not part.error
    for name in ("the target", "the drafter", "the AR head"):
        assert f"{name} never ran from a CUDA graph (bfloat16)" in part.problems


def test_speed_has_a_row_for_each_number_of_texts(run):
    part = run("speed")
    assert not part.error
    assert part.problems == []
    assert [row["texts"] for row in part.tables["iterations"]] == [1, 1, 8, 8, 32, 32]
    assert all(row["iteration_ms"] > 0 for row in part.tables["iterations"])
    assert {row["nodes"] for row in part.tables["passes"]} == {1, 8, 16, 64}


def test_every_text_is_decoded_in_every_measured_iteration(judge, gpu, monkeypatch):
    counts = []

    class Scheduler(judge.Scheduler):
        def step(self):
            events = super().step()
            counts.append(len(events))
            return events

    monkeypatch.setattr(judge, "Scheduler", Scheduler)
    backend = gpu.load(gpu.write_tiny(), dtype="float32")
    prompts = [[3] * 300] * 10  # more than a pass takes beside texts that are decoded
    config = judge.DecodeConfig(method="ar", max_tokens=60)
    judge.iteration_row(backend, prompts, config)
    assert counts == [10] * (judge.WARM_UP + judge.MEASURED)


def test_every_part_is_in_the_report(judge, tmp_path, in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(judge, "PARTS", {"machine": judge.machine, "target": judge.target})
    monkeypatch.setenv("TRITON_CACHE_DIR", "cache")
    monkeypatch.setenv("NVIDIA_API_KEY", "secret")
    path = tmp_path / "report.json"
    code = judge.main(["--device", "cpu", "--json", str(path)])
    assert "secret" not in path.read_text()
    report = json.loads(path.read_text())
    assert [part["name"] for part in report["parts"]] == ["machine", "target"]
    assert [row["name"] for row in report["parts"][0]["tables"]["tools"]] == [
        *("C compiler", "Python.h"),
    ]
    variables = report["parts"][0]["tables"]["environment"]
    assert {"name": "TRITON_CACHE_DIR", "value": "cache"} in variables
    assert report["parts"][1]["notes"] == ["target was left out: pass --target"]
    assert code == int(bool(report["problems"]))
    assert f"{len(report['problems'])} problem(s)" in capsys.readouterr().out


def test_decoding_goes_on_after_memory_ran_out(run):
    part = run("memory")
    assert not part.error
    assert part.problems == []
    assert part.tables["out of memory"]


def test_a_device_that_fails_is_a_problem_of_each_part(run, judge):
    with failing(judge.Gpu, "load", RuntimeError("this device is broken")):
        for name in ("graphs", "texts", "memory", "speed"):
            assert run(name).problems == [f"{name}: RuntimeError: this device is broken"]


def test_accelerators_have_a_reason_or_none(see_gpus):
    from accelerators import cuda_problem

    see_gpus(0)
    assert "no CUDA device is available" in cuda_problem()
    see_gpus(1)
    assert cuda_problem() is None
