"""The report about a GPU: each disappointment of a device makes a line, and stops nothing."""

import json
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from treeflash.decoding.interfaces import DeviceReport
from treeflash.errors import ConfigError

LOST = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def frame(module):
    return module("report")


@pytest.fixture
def judge(module):
    return module("cuda_parts")


@pytest.fixture
def report(frame, in_this_process, tmp_path):
    return frame.Report("test", tmp_path / "report.json", {"device": "fake"}, 60)


def read(report):
    return json.loads(report.path.read_text())


def add_rows(rows, part, error=None):
    """Add rows to a table, then raise the error."""
    for row in rows:
        part.add("table", **row)
    if error is not None:
        raise error


def find(*rows, **error):
    """Return a part that another process could run."""
    return partial(add_rows, rows, **error)


def test_a_part_that_fails_leaves_what_it_found_and_stops_nothing(report, capsys):
    report.run("first", find({"n": 1}, error=ValueError("two lines\nof text")))
    written = read(report)
    assert written["problems"] == ["first: ValueError: two lines"]
    (part,) = written["parts"]
    assert part["tables"] == {"table": [{"n": 1}]}
    assert "Traceback" in part["error"]
    assert "of text" in part["error"]
    report.run("second", find({"n": 2}))
    assert [x["name"] for x in read(report)["parts"]] == ["first", "second"]
    assert report.close() == 1
    printed = capsys.readouterr().out
    assert "PROBLEM: first: ValueError: two lines" in printed
    assert f"send {report.path}" in printed


def test_a_report_without_problems_says_so(report):
    report.run("first", find({"n": 1}))
    assert report.close() == 0
    assert read(report)["problems"] == []


def test_the_loss_of_a_device_stops_no_other_part(report):
    report.run("first", find({"n": 1}, error=RuntimeError(LOST)))
    report.run("second", find({"n": 1}))
    first, second = read(report)["parts"]
    assert first["problems"] == [f"first: RuntimeError: {LOST}"]
    assert second["tables"] == {"table": [{"n": 1}]}


def test_parts_beyond_the_time_are_left_out(frame, tmp_path):
    report = frame.Report("test", tmp_path / "report.json", {}, 0)
    report.run("first", find({"n": 1}))
    assert read(report)["parts"][0]["notes"] == ["first was left out: the time was over"]
    assert report.close() == 0


def test_an_interruption_leaves_a_report(report):
    report.run("first", find({"n": 1}))
    with pytest.raises(KeyboardInterrupt):
        report.run("second", find({"n": 1}, error=KeyboardInterrupt()))
    first, second = read(report)["parts"]
    assert first["tables"]
    assert second["tables"] == {"table": [{"n": 1}]}
    assert second["notes"] == ["interrupted"]


def warn(part):
    for package in ("treeflash_cuda", "torch"):
        name = str(Path("treeflash", "site-packages", package, "module.py"))
        warnings.warn_explicit(f"{package} is slow", UserWarning, name, 1)


def test_warnings_of_treeflash_are_problems(report):
    report.run("first", warn)
    assert report.problems == ["first: treeflash_cuda is slow"]


def test_rows_of_a_table_may_have_other_columns(report, capsys):
    report.run("first", find({"a": 1}, {"b": 2}))
    assert "| a | b |" in capsys.readouterr().out


def test_a_kernel_that_fell_back_and_a_failed_capture_are_lines(module):
    kernels = {"rms_norm": {"bfloat16": "used (Triton)"}, "gated": {"bfloat16": "no ptxas"}}
    kernels["CUDA graphs"] = {"the target": "used (3 graphs)", "the drafter": "not permitted"}
    assert list(module("device_parts").kernel_problems(DeviceReport(kernels=kernels))) == [
        "gated, bfloat16: no ptxas",
        "CUDA graphs, the drafter: not permitted",
    ]


def test_the_largest_shape_that_fits_the_gpu_is_measured(judge):
    gib = 1 << 30
    assert judge.choose_shape(79 * gib) == "qwen3-8b"
    assert judge.choose_shape(23 * gib) == "qwen3-4b"
    assert judge.choose_shape(0) == "tiny"


def test_a_profile_counts_the_kernels_of_an_iteration_once(judge):
    def event(key, device, microseconds, count):
        device_type = SimpleNamespace(name=device)
        return SimpleNamespace(
            key=key, device_type=device_type, self_device_time_total=microseconds, count=count
        )

    launch = event("cudaGraphLaunch", "CPU", 9000.0, 30)
    averages = [event("gated", "CUDA", 2000.0, 10), launch, event("linear", "CUDA", 7000.0, 20)]
    assert judge.kernel_rows(averages, 10) == [
        {"kernel": "linear", "ms": 0.7, "calls": 2.0},
        {"kernel": "gated", "ms": 0.2, "calls": 1.0},
    ]


def test_a_missing_extra_is_named_before_the_work(module, monkeypatch):
    common = module("common")
    monkeypatch.setattr(common, "find_spec", lambda name: None if name == "pytest" else name)
    with pytest.raises(ConfigError, match=r"needs pytest; pip install '\.\[mlx,testing\]'"):
        common.require_testing("mlx")
