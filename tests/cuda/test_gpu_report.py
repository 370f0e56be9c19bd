"""The parts of the report about a GPU, run on a CPU, where graphs and kernels disappoint."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import pytest
from endless_pair import endless_pair
from failures import failing

from treeflash.config import METHODS
from treeflash.decoding.tree import accept
from treeflash.errors import ConfigError
from treeflash.testing import require
from treeflash.testing.models import write_target

require("torch")

from parts import load_with_parts


@pytest.fixture
def shared(module, monkeypatch):
    monkeypatch.setattr(module("device_parts"), "TOKENS", 16)
    return module("device_parts")


@pytest.fixture
def judge(module, shared, monkeypatch):
    monkeypatch.setattr(module("cuda_parts"), "TOKENS", 16)
    return module("cuda_parts")


@pytest.fixture
def options(tmp_path):
    """Options that choose a tiny pair on the CPU."""
    pair = endless_pair(tmp_path / "pair")
    return [*pair, "--device", "cpu", "--dtype", "float32", "--max-tokens", "4"]


@pytest.fixture
def gpu(module, judge, tmp_path, options):
    args = module("device_report").parser().parse_args([*options, "--shape", "tiny"])
    args.backend = "cuda"
    return judge.Gpu(args, tmp_path, end=time.time() + 600)


@pytest.fixture
def run(module, judge, gpu):
    """Runs a part, and returns it."""

    def run_part(name):
        part = module("report").Part(name)
        module("report").find_here(part, partial(judge.PARTS[name], gpu))
        return part

    return run_part


def test_a_machine_without_a_gpu_is_told_why(module, tmp_path, see_gpus, capsys):
    see_gpus(0)
    path = tmp_path / "report.json"
    assert module("device_report").main(["--backend", "cuda", "--json", str(path)]) == 2
    why = json.loads(path.read_text())["device"]["why"]
    assert "no CUDA device is available" in why
    assert why in capsys.readouterr().err


# Texts of six pairs by every method. `test_a_wrong_text` compares those of one.
@pytest.mark.nightly
def test_texts_that_agree_are_no_problem(run):
    part = run("texts")
    assert not part.error
    assert part.problems == []
    assert {row["pair"] for row in part.tables["texts"]} == {
        *("float32", "float32, 8-bit KV cache", "float32, gated delta nets", "float32, Mamba-2"),
        *("exact bfloat16", "exact float16"),
        *("float32, 8 at once", "float32, 8 at once after a stored prompt"),
    }
    assert all(row["equal_up_to"] == row["tokens"] == 16 for row in part.tables["texts"])


def test_a_wrong_text_is_a_problem_by_method(run, judge, shared, monkeypatch):
    from treeflash.decoding import loop

    def accept_too_much(tree, sampled):
        right = accept(tree, sampled)
        return right if len(tree) == 1 else type(right)(right.path, (*right.tokens[:-1], 3))

    monkeypatch.setattr(loop, "accept", accept_too_much)
    monkeypatch.setattr(judge, "DTYPES", ())
    monkeypatch.setattr(judge, "VARIANTS", {"float32": ("qwen3", {"dtype": "float32"})})
    monkeypatch.setattr(shared, "TINY_METHODS", ("treeflash",))
    part = run("texts")
    for where in ("with float32", "2 at once", "2 at once after a stored prompt"):
        line = f"treeflash, greedy, {where} differs"
        assert any(problem.startswith(line) for problem in part.problems), where


# Two seconds for a report of a device; `test_graphs.py` has what it reports.
@pytest.mark.nightly
def test_without_graphs_every_function_is_a_problem(run):
    part = run("graphs")
    assert not part.error
    for name in ("the target", "the drafter", "the AR head"):
        assert f"{name} never ran from a CUDA graph (bfloat16)" in part.problems


# Six sizes of batches; `test_every_text_is_decoded_in_every_measured_iteration` has one.
@pytest.mark.nightly
def test_iterations_have_rows_for_each_number_of_texts_beside_plain_decoding(run):
    part = run("iterations")
    assert not part.error
    assert part.problems == []
    rows = part.tables["iterations"]
    kinds = [(row["texts"], row["sampling"], row["method"]) for row in rows]
    assert kinds == list(product((1, 8, 32), ("greedy", "sampled"), ("ar", "treeflash")))
    assert all(row["iteration_ms"] > 0 and row["break_even"] > 0 for row in rows)
    assert {row["nodes"] for row in part.tables["passes"]} == {1, 8, 16, 64}
    assert [row["rows"] for row in part.tables["wide passes"]] == [768, 768]


# Two seconds for a report; the other tests look at what it says.
@pytest.mark.nightly
def test_a_real_pair_is_measured_beside_transformers(run):
    (peer,) = run("peer").tables["methods"]
    assert peer["system"] == "transformers"
    part = run("speed")
    assert not part.error
    assert [row["method"] for row in part.tables["methods"]] == list(METHODS)
    for row in [peer, *part.tables["methods"]]:
        assert row["tokens_per_s"] > 0
    assert all(row["equal_up_to"] == 4 for row in part.tables["methods"])  # in float32
    part = run("exact")
    assert not part.problems
    assert part.tables["methods"] or part.notes


def test_without_a_target_its_parts_are_left_out(run, gpu):
    gpu.missing = "the hub cannot be reached"
    for name in ("peer", "speed", "exact"):
        part = run(name)
        assert part.notes == [f"{name} was left out: there is no target: {gpu.missing}"]
        assert not part.problems


def test_kernels_are_checked_for_what_real_models_have(run, judge, gpu, monkeypatch):
    def check(gpu, dtype, head_dim, quantised):
        verdicts = {"rms_norm": "used (Triton)", "gated": "used (Triton)"}
        if dtype == "float32":
            verdicts["gated"] = "ptxas is missing"
        errors = {"gated": "a whole error"} if dtype == "float32" else {}
        flash = "it is too wide" if head_dim == 256 else None
        return judge.CheckedKernels(1.0, verdicts, {"rms_norm": 0.003}, errors, flash)

    monkeypatch.setattr(judge, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    monkeypatch.setattr(judge, "check_kernels", check)
    part = run("kernels")
    assert not part.error
    assert len(part.tables["compiling"]) == len(judge.KERNEL_CASES)
    found = [row["difference"] for row in part.tables["verdicts"] if row["kernel"] == "rms_norm"]
    assert found == [0.003] * len(judge.KERNEL_CASES)
    assert [row["error"] for row in part.tables["errors"]] == ["a whole error"]
    assert part.problems == [
        "FlashAttention is not used with dtype bfloat16, head_dim 256, quantised_keys False: it is "
        "too wide",
        "gated runs in PyTorch with dtype float32, head_dim 128, quantised_keys False: ptxas is "
        "missing",
    ]
    gpu.end = 0.0
    part = run("kernels")
    assert len(part.tables["compiling"]) == 1
    assert part.notes == [
        "kernels were cut short after dtype bfloat16, head_dim 64, quantised_keys False"
    ]


def test_a_step_of_training_has_the_loss_of_a_processor(run, judge, monkeypatch):
    monkeypatch.setattr(judge, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    part = run("training")
    assert not part.error
    assert part.problems == []
    one, other = (row["loss"] for row in part.tables["first step"])
    assert one == other > 0
    losses = iter((2.0, 2.2))
    monkeypatch.setattr(judge, "first_loss", lambda *_: next(losses))
    assert run("training").problems == ["the loss of a first step is 2.2000, on a processor 2.0000"]


def test_speeds_come_before_what_compiles(judge):
    names = list(judge.PARTS)
    assert names[:4] == ["machine", "peer", "speed", "iterations"]
    assert names[-2:] == ["kernels", "resources"]


def test_every_text_is_decoded_in_every_measured_iteration(judge, gpu, monkeypatch):
    counts = []

    class Scheduler(judge.Scheduler):
        def step(self):
            events = super().step()
            counts.append(len(events))
            return events

    monkeypatch.setattr(judge, "Scheduler", Scheduler)
    backend = gpu.load(gpu.write_tiny(), dtype="float32")
    config = judge.DecodeConfig(method="ar", max_tokens=60)
    # Their prompts have more tokens than a pass takes beside texts that are decoded.
    judge.iteration_row(backend, 10, config)
    assert counts == [10] * (judge.WARM_UP + judge.MEASURED)


def test_calls_of_an_iteration_have_times_of_the_devices_clock(judge, gpu, monkeypatch):
    """Work that a call leaves to the device counts where it was asked for."""
    backend = gpu.load(gpu.write_tiny(), dtype="float32")
    now, took = [0.0], {"draft": 3.0, "transitions": 5.0, "run": 7.0, "commit": 2.0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, later):
            return later.at - self.at

    def taking(ms, call):
        def call_later(*args):
            now[0] += ms
            return call(*args)

        return call_later

    for role in (backend.drafter, backend.head, backend.verifier):
        for name in took.keys() & set(dir(role)):
            monkeypatch.setattr(role, name, taking(took[name], getattr(role, name)))
    monkeypatch.setattr("torch.cuda.Event", Event)
    clock = judge.DeviceClock()
    scheduler = judge.start_texts(backend, 2, judge.DecodeConfig(budget=8, max_tokens=20))
    with clock.watch(backend):
        scheduler.step()
        clock.read()
        scheduler.step()
        found = clock.read()
    assert found == {
        **{"draft_device_ms": 3.0, "tables_device_ms": 5.0},
        **{"verify_device_ms": 7.0, "commit_device_ms": 2.0},
    }
    scheduler.step()
    assert clock.read() == {}
    scheduler.close()


def test_drafters_of_fewer_bits_are_measured_or_have_a_reason(run, gpu, monkeypatch):
    part = run("draft_bits")
    assert not part.error
    assert not part.notes
    rows = part.tables["methods"]
    assert [row["method"] for row in rows] == [
        "treeflash, drafter in 4 bits",
        "treeflash, drafter in 8 bits",
    ]
    assert all(row["ratio_to_ar"] > 0 and row["equal_up_to"] == 4 for row in rows)

    def refuse(draft_bits):
        raise ConfigError(f"{draft_bits} bits are too few")

    monkeypatch.setattr(gpu, "load_model", refuse)
    assert run("draft_bits").notes == [
        f"drafter in {bits} bits is refused: {bits} bits are too few" for bits in (4, 8)
    ]


def test_formats_of_the_target_are_measured_or_have_a_reason(run, gpu, judge, monkeypatch):
    def write(target, folder, kind, settings):
        if settings:
            raise ImportError(f"{kind} needs bitsandbytes\nand more")
        shutil.copytree(target, folder)

    monkeypatch.setattr(judge, "write_quantised", write)
    part = run("formats")
    assert not part.problems
    assert [row["method"] for row in part.tables["methods"]] == ["ar, FP8", "treeflash, FP8"]
    assert part.notes == [
        "4 bits of bitsandbytes cannot be had here: BitsAndBytesConfig needs bitsandbytes"
    ]
    monkeypatch.setattr(judge, "is_quantised", lambda _: True)
    assert run("formats").notes == [
        "formats was left out: the target's weights are quantised already"
    ]


def test_rows_beyond_the_largest_graph_are_measured_in_one_graph_too(judge, tmp_path, monkeypatch):
    monkeypatch.setattr("treeflash_cuda.gpu.graphs.GRAPH_ROWS", (1, 4, 8))
    monkeypatch.setattr("treeflash_cuda.gpu.row_pass.MAX_ROWS", 8)
    monkeypatch.setattr(judge, "WIDE_NODES", 4)
    write_target(tmp_path, "qwen3", seed=1)
    backend = load_with_parts(monkeypatch, tmp_path)
    rows = judge.wide_rows(backend, 1)
    assert [(row["rows"], row["in"]) for row in rows] == [(12, "today's passes"), (12, "one pass")]
    assert all(row["verify_ms"] > 0 for row in rows)
    assert {shapes[0][0] for _, (_, shapes, _), _ in backend.target.graphs.keys} >= {4, 8, 12}


def test_every_part_is_in_the_report(
    module, judge, options, tmp_path, in_this_process, monkeypatch, capsys
):
    monkeypatch.setattr(judge, "PARTS", {"machine": judge.machine, "speed": judge.speed})
    monkeypatch.setenv("TRITON_CACHE_DIR", "cache")
    monkeypatch.setenv("NVIDIA_API_KEY", "secret")
    path = tmp_path / "report.json"
    arguments = ["--backend", "cuda", *options, "--json", str(path)]
    code = module("device_report").main(arguments)
    assert "secret" not in path.read_text()
    report = json.loads(path.read_text())
    machine, speed = report["parts"]
    assert [row["name"] for row in machine["tables"]["tools"]] == ["C compiler", "Python.h"]
    variables = machine["tables"]["environment"]
    assert {"name": "TRITON_CACHE_DIR", "value": "cache"} in variables
    assert len(speed["tables"]["methods"]) == len(METHODS)
    assert code == int(bool(report["problems"]))
    printed = capsys.readouterr().out
    assert "part 2 of 2: speed" in printed
    line = r"^speed: treeflash, ar: [\d.]+ tokens/s, 1\.00x plain decoding$"
    assert re.search(line, printed, re.MULTILINE)
    assert f"{len(report['problems'])} problem(s)" in printed


def test_a_target_that_cannot_be_located_leaves_the_other_parts(
    module, judge, tmp_path, in_this_process, monkeypatch
):
    monkeypatch.setattr(judge, "PARTS", {"machine": judge.machine, "speed": judge.speed})
    path = tmp_path / "report.json"
    missing = ["--target", str(tmp_path / "missing"), "--device", "cpu"]
    module("device_report").main(["--backend", "cuda", *missing, "--json", str(path)])
    machine, speed = json.loads(path.read_text())["parts"]
    assert machine["tables"]["device"]
    (note,) = speed["notes"]
    assert note.startswith("speed was left out: there is no target: ")


# Likewise; `test_memory.py` has what it reports.
@pytest.mark.nightly
def test_decoding_goes_on_after_memory_ran_out(run):
    part = run("memory")
    assert not part.error
    assert part.problems == []
    assert part.tables["out of memory"]


def test_a_device_that_fails_is_a_problem_of_each_part(run, shared):
    with failing(shared.Device, "load", RuntimeError("this device is broken")):
        for name in ("graphs", "texts", "memory", "iterations"):
            assert run(name).problems == [f"{name}: RuntimeError: this device is broken"]


def test_accelerators_have_a_reason_or_none(see_gpus):
    from accelerators import cuda_problem

    see_gpus(0)
    assert "no CUDA device is available" in cuda_problem()
    see_gpus(1)
    assert cuda_problem() is None
