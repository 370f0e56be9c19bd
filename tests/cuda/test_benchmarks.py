"""Benchmarks that need PyTorch, on tiny models: the report about a GPU, scripts, the notebook."""

from __future__ import annotations

import json
import re
import shutil
import time
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from byte_tokens import endless_pair
from failures import failing
from gguf import GGMLQuantizationType
from gguf_files import write_gguf
from safetensors.numpy import load_file, save_file
from stand_ins import stand_in

import treeflash
from treeflash.config import METHODS, LoadConfig
from treeflash.testing import require
from treeflash.testing.models import write_pair, write_target
from treeflash.text.tokenizer import Tokenizer

require("torch")

import torch
from parts import load_with_parts
from treeflash_cuda.backend import load
from treeflash_cuda.gpu import graphs, row_pass


@pytest.fixture
def judge(module):
    return module("cuda_parts")


@pytest.fixture
def tiny(tmp_path):
    return load(*write_pair(tmp_path / "tiny", "qwen3"), LoadConfig(device="cpu", dtype="float32"))


@pytest.fixture
def two_parts(judge, monkeypatch):
    """Let a report have two parts."""
    stand_in(monkeypatch, judge, PARTS={"machine": judge.machine, "speed": judge.speed})


@pytest.fixture
def options(tmp_path):
    """Options that choose a tiny pair on the CPU."""
    pair = endless_pair(tmp_path / "pair")
    return [*pair, "--device", "cpu", "--dtype", "float32", "--max-tokens", "4"]


@pytest.fixture
def gpu(module, judge, options):
    args = module("device_report").parser().parse_args([*options, "--shape", "tiny"])
    args.backend = "cuda"
    return judge.Gpu(args, end=time.time() + 600)


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


def test_every_text_is_decoded_in_every_measured_iteration(judge, tiny, monkeypatch):
    counts = []

    class Scheduler(judge.Scheduler):
        def step(self):
            events = super().step()
            counts.append(len(events))
            return events

    stand_in(monkeypatch, judge, Scheduler=Scheduler)
    config = judge.DecodeConfig(method="ar", max_tokens=60)
    # Their prompts have more tokens than a pass takes beside texts that are decoded.
    judge.iteration_row(tiny, 10, config)
    assert counts == [10] * (judge.WARM_UP + judge.MEASURED)


def test_calls_of_an_iteration_have_times_of_the_devices_clock(judge, monkeypatch):
    """Work that a call leaves to the device counts where it was asked for."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, later):
            return later.at - self.at

    def taking(ms):
        return lambda: now.append(now.pop() + ms)

    stand_in(monkeypatch, torch.cuda, Event=Event)
    drafter, head = SimpleNamespace(draft=taking(3.0)), SimpleNamespace(transitions=taking(5.0))
    verifier = SimpleNamespace(run=taking(7.0), commit=taking(2.0))

    def iterate():
        drafter.draft(), head.transitions(), verifier.run(), verifier.commit()

    clock = judge.DeviceClock()
    with clock.watch(SimpleNamespace(drafter=drafter, head=head, verifier=verifier)):
        iterate()
        clock.read()
        iterate()
        found = clock.read()
    assert found == {
        **{"draft_device_ms": 3.0, "tables_device_ms": 5.0},
        **{"verify_device_ms": 7.0, "commit_device_ms": 2.0},
    }
    iterate()
    assert clock.read() == {}


def test_rows_beyond_the_largest_graph_are_measured_in_one_graph_too(judge, tmp_path, monkeypatch):
    stand_in(monkeypatch, graphs, GRAPH_ROWS=(1, 4, 8))
    stand_in(monkeypatch, row_pass, MAX_ROWS=8)
    stand_in(monkeypatch, judge, WIDE_NODES=4)
    write_target(tmp_path, "qwen3", seed=1)
    backend = load_with_parts(monkeypatch, tmp_path)
    rows = judge.wide_rows(backend, 1)
    assert [(row["rows"], row["in"]) for row in rows] == [(12, "today's passes"), (12, "one pass")]
    assert all(row["verify_ms"] > 0 for row in rows)
    assert {shapes[0][0] for _, (_, shapes, _), _ in backend.target.graphs.keys} >= {4, 8, 12}


@pytest.mark.usefixtures("two_parts", "in_this_process")
def test_every_part_is_in_the_report(module, options, tmp_path, monkeypatch, capsys):
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
    assert report["problems"] == ["the target never ran from a CUDA graph"]  # on a processor
    assert code == int(bool(report["problems"]))
    printed = capsys.readouterr().out
    assert "part 2 of 2: speed" in printed
    line = r"^speed: treeflash, ar: [\d.]+ tokens/s, 1\.00x plain decoding$"
    assert re.search(line, printed, re.MULTILINE)
    assert f"{len(report['problems'])} problem(s)" in printed


@pytest.mark.usefixtures("two_parts", "in_this_process")
def test_a_target_that_cannot_be_located_leaves_the_other_parts(module, tmp_path):
    path = tmp_path / "report.json"
    missing = ["--target", str(tmp_path / "missing"), "--device", "cpu"]
    module("device_report").main(["--backend", "cuda", *missing, "--json", str(path)])
    machine, speed = json.loads(path.read_text())["parts"]
    assert machine["tables"]["device"]
    (note,) = speed["notes"]
    assert note.startswith("speed was left out: there is no target: ")


def test_a_device_that_fails_is_a_problem_of_the_part(run, judge):
    with failing(judge, "load_pair", RuntimeError("this device is broken")):
        assert run("iterations").problems == ["iterations: RuntimeError: this device is broken"]


def test_every_test_for_devices_runs_once_before_its_other_cases(
    module, gpu, tmp_path, monkeypatch, capsys
):
    """A test that fails is a problem, with its message; the time is looked at after each test."""
    shared, reports = module("device_parts"), module("report")
    suite, order = tmp_path / "test_suite.py", tmp_path / "order"
    suite.write_text(
        "import pathlib, pytest\npytestmark = pytest.mark.device\n"
        f"order = pathlib.Path({str(order)!r})\n"
        "@pytest.mark.parametrize('n', [0, 1])\n"
        "def test_a(n):\n    order.open('a').write(f'a{n} ')\n    assert n == 0, 'it broke'\n"
        "def test_b():\n    order.open('a').write('b ')\n    pytest.skip('no Metal')\n"
    )
    stand_in(monkeypatch, shared, SUITE=suite)
    part = reports.Part("tests")
    shared.tests(gpu, part)
    assert order.read_text().split() == ["a0", "b", "a1"]
    assert part.tables["tests"] == [{"passed": 1, "skipped": 1, "failed": 1}]
    (failure,) = part.tables["failures"]
    assert "it broke" in failure["message"]
    assert part.problems == [f"{failure['test']} failed"]
    gpu.end = 0.0
    late = reports.Part("tests")
    shared.tests(gpu, late)
    assert late.tables["tests"] == [{"passed": 1}]
    assert late.notes == ["tests were cut short"]


def test_the_quality_of_few_bits_is_measured(module, tmp_path):
    """Answers are the reference's most likely tokens, so that rows of other tokens show."""
    require("llvmlite")
    write_gguf(tmp_path / "tiny.gguf", kind=lambda name: GGMLQuantizationType.Q4_1)
    prompts, file = tmp_path / "a.jsonl", tmp_path / "out.json"
    prompts.write_text(json.dumps({"id": 0, "turns": ["the 12 the"]}))
    quality = module("decoding.quality")
    options = ["--target", str(tmp_path / "tiny.gguf"), "--max-tokens", "6", "--json", str(file)]
    assert quality.main([str(prompts), *options]) == 0
    reference, *variants = json.loads(file.read_text())["rows"]
    assert float(reference["divergence"]) == 0
    assert reference["same top"] == 1
    assert 1 < float(reference["perplexity"]) < 265  # tokens, of which a uniform guess is one
    assert len({row["divergence"] for row in variants}) == len(quality.VARIANTS)
    assert all(0 < float(row["divergence"]) < 0.2 for row in variants)
    assert {row["tokens"] for row in variants} == {reference["tokens"]} != {0}
    model = treeflash.load(
        str(tmp_path / "tiny.gguf"), False, backend="cuda", device="cpu", bits=16
    )
    answer = model.generate([5, 6, 7], method="ar", max_tokens=6).token_ids
    found = quality.log_probabilities(model, [5, 6, 7, *answer], len(answer))
    assert found.argmax(-1).tolist() == answer
    np.testing.assert_allclose(np.exp(found).sum(-1), 1)


# Seconds, for scripts of benchmarks that change seldom.
@pytest.mark.nightly
@pytest.mark.parametrize(
    "own",
    [
        "--concurrency 1,2 --backends cuda",
        "--systems transformers,treeflash --backends cuda --threads 1",
    ],
)
def test_a_comparison_runs(own, module, options, tmp_path):
    """All systems run, and in float32 they give the same tokens."""
    prompts, file = tmp_path / "a.jsonl", tmp_path / "out.json"
    prompts.write_text("\n".join(json.dumps({"id": n, "turns": [f"Why {n}"]}) for n in range(2)))
    given = [str(prompts), *options, *own.split(), "--limit", "1", "--json", str(file)]
    assert module("peers.__main__").main(given) == 0
    results = json.loads(file.read_text())
    rows = [row for row in results["rows"] if row["set"] == "a"]
    assert {row["system"] for row in rows} == {"treeflash", "transformers"}
    assert all(row["equal"] == row["prompts"] > 0 for row in rows)
    assert {row["method"] for row in results["skipped"]} <= {"assisted"}
    assert results["device"] == "cpu"


# Seconds, for a process that loads PyTorch.
@pytest.mark.nightly
def test_transformers_is_not_measured_with_random_weights(module, options):
    target = Path(options[1])
    tensors = load_file(target / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    args = module("peers.__main__").parser().parse_args(["a.jsonl", *options])
    setup = module("peers.system").setup_of(args, target, Tokenizer.from_folder(target))
    system = module("peers.system")
    with pytest.raises(system.PeerError, match=r"has no model\.norm\.weight for transformers"):
        system.Peer(system.SYSTEMS[0], setup, threads=1)


ROOT = Path(__file__).parents[2]


# A minute, for a whole report, and a page that changes seldom.
@pytest.mark.nightly
def test_the_notebook_compares_plots_and_writes_a_report(tmp_path, monkeypatch):
    require("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    _, target, _, drafter = pair = endless_pair(tmp_path / "pair")
    source = tmp_path / "clone"
    source.mkdir()
    shutil.copytree(ROOT / "benchmarks", source / "benchmarks")
    cells = json.loads((ROOT / "docs" / "first_gpu.ipynb").read_text())["cells"]
    variables = {}
    tags = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        tags += (found := cell["metadata"].get("tags", []))
        assert cell["outputs"] == [], "outputs are not stored"
        if "install" in found:
            assert "%pip install" in "".join(cell["source"])
            continue
        exec("".join(cell["source"]), variables)
        if "parameters" in found:
            load = {"target": target, "drafter": drafter, "device": "cpu", "dtype": "float32"}
            options = [*pair, "--backend", "cuda", "--device", "cpu", "--minutes", "1"]
            options += ["--shape", "tiny", "--max-tokens", "4"]
            variables |= {"PAIR": load, "MAX_TOKENS": 8, "SOURCE": str(source)}
            variables["REPORT_OPTIONS"] = options
    assert tags == ["install", "parameters"]
    texts = [[text.token_ids for text in found] for found in variables["answers"].values()]
    assert texts[0] == texts[1]
    assert (tmp_path / "tokens_per_second.png").stat().st_size > 1000
    report = json.loads((source / "report.json").read_text())
    assert report["parts"][0]["tables"]["device"]
