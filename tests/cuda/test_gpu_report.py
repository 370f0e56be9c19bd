"""The parts of the report about a GPU, run on a CPU, where graphs and kernels disappoint."""

import json
from argparse import Namespace

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
    return judge.Gpu(torch.device("cpu"), tmp_path, Namespace(target=None, shape="tiny"))


@pytest.fixture
def run(module, judge, gpu):
    """Runs a part, and returns it."""

    def run_part(name):
        report = module("report").Report("test", None, {}, 600)
        report.run(name, lambda part: judge.PARTS[name](gpu, part))
        return report.parts[0]

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
        *("float32", "exact bfloat16", "exact float16"),
    }
    assert all(row["equal_up_to"] == row["tokens"] == 16 for row in part.tables["texts"])


def test_a_wrong_text_is_a_problem_by_method(run, judge, monkeypatch):
    from treeflash.decoding import loop

    def accept_too_much(tree, sampled):
        right = accept(tree, sampled)
        return right if len(tree) == 1 else type(right)(right.path, (*right.tokens[:-1], 3))

    monkeypatch.setattr(loop, "accept", accept_too_much)
    monkeypatch.setattr(judge, "DTYPES", ())
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


def test_after_the_loss_of_a_device_its_memory_is_left_alone(judge, tmp_path, monkeypatch, capsys):
    def lose(gpu, part):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(judge, "PARTS", {"first": lose, "second": lose})
    monkeypatch.setattr(judge, "release", lose)
    path = tmp_path / "report.json"
    assert judge.main(["--device", "cpu", "--json", str(path)]) == 1
    assert len(json.loads(path.read_text())["parts"]) == 2
    assert "1 problem(s)" in capsys.readouterr().out


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
