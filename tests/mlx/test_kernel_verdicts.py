"""Verdicts on Metal kernels that were timed against MLX's operations, kept for other processes."""

import logging
import math
import platform

import pytest

from treeflash.testing import require

require("mlx.core")

import mlx.core as mx
from treeflash_mlx import metal_kernels
from treeflash_mlx.metal_kernels import choose, verdicts
from treeflash_mlx.metal_kernels.verdicts import KeptVerdicts, Verdict, file_of


@pytest.fixture
def process(monkeypatch, tmp_path):
    """Begins another process on this machine, whose kernels have these gains when timed.

    What it returns is the list of the checks and timings that the process ran.
    """

    def begin(*gains):
        ran, coming = [], iter(gains)
        kept = KeptVerdicts(tmp_path / "kernels" / "a.json")
        monkeypatch.setattr(metal_kernels, "kept_verdicts", lambda: kept)
        monkeypatch.setattr(metal_kernels, "VERDICTS", {})
        monkeypatch.setattr(
            metal_kernels, "speedup", lambda *_: ran.append("timing") or next(coming)
        )
        metal_kernels.announce_timing.cache_clear()
        return ran

    return begin


def decide(ran, key=(1,), size="5 rows", errors=(0.0,), kernels=("a", "b")):
    def check():
        ran.append("check")
        return errors

    links = dict.fromkeys(kernels, lambda x, _: x)
    return choose("products", "8 x 8", size, check, 0.1, links, None, None, key=key)


def test_a_later_process_neither_checks_nor_times(process, caplog, monkeypatch):
    monkeypatch.setattr(Verdict, "found_now", lambda *of: Verdict(*of, "2026-11-29"))
    with caplog.at_level(logging.WARNING):
        assert decide(process(1.5, 1.8)) == "b"
        assert decide(ran := process(0.9, 0.8), size="6 rows") is None
    assert ran == ["check", "timing", "timing"]
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "timing Metal kernels and MLX's operations"
    ] * 2
    caplog.clear()
    ran = process()
    assert (decide(ran), decide(ran, size="6 rows")) == ("b", None)
    assert (ran, caplog.records) == ([], [])
    assert metal_kernels.VERDICTS == {
        "products, 8 x 8": {
            "5 rows": "used, 1.80 times as fast as MLX's operation with b, timed on 2026-11-29",
            "6 rows": "not used, 0.90 times as fast as MLX's operation with a, timed on 2026-11-29",
        }
    }


def test_another_shape_of_the_same_name_is_timed(process):
    decide(process(1.5), kernels=("a",))
    ran = process(1.1)
    assert decide(ran, key=(2,), kernels=("a",)) is None
    assert ran == ["check", "timing"]


@pytest.mark.parametrize("errors", [(1.0,), (0.0, math.nan)])
def test_a_wrong_kernel_is_tried_again(process, errors):
    with pytest.warns(UserWarning, match="products run without their Metal kernel"):
        assert decide(process(), errors=errors) is None
    assert decide(process(1.5), kernels=("a",)) == "a"


def test_all_kernels_can_be_timed_again(process):
    decide(process(1.5), kernels=("a",))
    ran = process(1.1)
    metal_kernels.kept_verdicts().forget()
    assert decide(ran, kernels=("a",)) is None
    assert decide(process(), kernels=("a",)) is None


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"a": {"winner": "b"}}'])
def test_after_a_damaged_file_kernels_are_timed_anew(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    kept = KeptVerdicts(path)
    assert kept.find("a") is None
    kept.keep("a", Verdict("b", "used", "2026-11-29"))
    assert KeptVerdicts(path).find("a") == Verdict("b", "used", "2026-11-29")


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "file").touch()
    kept = KeptVerdicts(tmp_path / "file" / "a.json")
    kept.keep("a", Verdict("b", "used", "2026-11-29"))
    assert kept.find("a") is not None


def test_what_verdicts_depend_on(tmp_path, monkeypatch):
    """The machine, macOS, MLX and the kernels: a change of each gives another file."""
    source = tmp_path / "kernel.py"
    source.write_text("1")
    info = {"architecture": "applegpu_g16s", "device_name": "M4", "memory_size": 1}
    monkeypatch.setattr(mx, "device_info", lambda *_: info)
    files = [file_of(tmp_path, [source])]
    assert file_of(tmp_path, [source]) == files[0]
    for module, name, value in (
        (mx, "device_info", lambda *_: info | {"architecture": "applegpu_g15s"}),
        (platform, "mac_ver", lambda: ("26.2", ("", "", ""), "")),
        (verdicts, "version", lambda _: "0.33"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            files.append(file_of(tmp_path, [source]))
    source.write_text("2")
    files.append(file_of(tmp_path, [source]))
    assert len(set(files)) == 5
    assert {path.parent for path in files} == {tmp_path}


def test_the_file_depends_on_every_kernel(monkeypatch, tmp_path):
    """Kernels of hybrid targets, which have their own file, count too."""
    seen = []
    monkeypatch.setattr(
        metal_kernels, "file_of", lambda folder, paths: seen.extend(paths) or folder / "a"
    )
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path))
    assert metal_kernels.kept_verdicts.__wrapped__().path == tmp_path / "kernels" / "a"
    names = {path.name for path in seen if path.exists()}
    assert {"products.py", "attention.py", "gated_delta.py", "hybrid.py"} <= names


def test_one_line_says_which_kernels_are_used(monkeypatch):
    loses, wins = {"5 rows": "not used, 0.90 times as fast"}, {"5 rows": "used, 1.20 times as fast"}
    found = {"products, 8 x 8": loses, "products, 9 x 9": loses | {"7 rows": wins["5 rows"]}}
    monkeypatch.setattr(metal_kernels, "VERDICTS", found | {"attention, 4 heads": loses})
    assert metal_kernels.summary() == "products in 1 of 2 shapes; attention in 0 of 1 shapes"
