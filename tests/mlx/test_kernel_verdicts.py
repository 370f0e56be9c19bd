"""Verdicts on Metal kernels that were timed against MLX's operations, kept for other processes."""

import logging
import math
import platform
from datetime import date

import pytest
from stand_ins import stand_in

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
        stand_in(
            monkeypatch,
            metal_kernels,
            kept_verdicts=lambda: kept,
            VERDICTS={},
            MESSAGES={},
            speedup=lambda *_: ran.append("timing") or next(coming),
        )
        metal_kernels.announce_timing.cache_clear()
        return ran

    return begin


def decide(ran, key=(1,), size="5 rows", errors=(0.0,), kernels=("a", "b")):
    def check(_):
        ran.append("check")
        return {f"case {n}" if n else "": error for n, error in enumerate(errors)}

    links = dict.fromkeys(kernels, lambda x, _: x)
    return choose("products", "8 x 8", size, check, 0.1, links, None, None, key=key)


def test_a_later_process_checks_the_winner_and_times_nothing(process, caplog):
    with caplog.at_level(logging.WARNING):
        assert decide(process(1.5, 1.8)) == "b"
        assert decide(ran := process(0.9, 0.8), size="6 rows") is None
    assert ran == ["check", "timing"] * 2
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "timing Metal kernels and MLX's operations"
    ] * 2
    caplog.clear()
    ran = process()
    assert (decide(ran), decide(ran, size="6 rows")) == ("b", None)
    assert (ran, caplog.records) == (["check"], [])
    texts = {
        "5 rows": "used, 1.80 times as fast as MLX's operation with b, timed on ",
        "6 rows": "not used, 0.90 times as fast as MLX's operation with a, timed on ",
    }
    found = metal_kernels.VERDICTS["products, 8 x 8"]
    assert {size: text[:-10] for size, text in found.items()} == texts
    assert all(date.fromisoformat(text[-10:]) for text in found.values())


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


def test_a_kernel_that_won_and_is_wrong_now_is_not_used(process):
    """A driver may change without a version of its own."""
    decide(process(1.5, 1.8))
    with pytest.warns(UserWarning, match=r"relative error is 1.0e\+00 \(case 1\) with b"):
        assert decide(process(), errors=(0.0, 1.0)) is None
    assert decide(process()) == "b"


def test_a_variant_that_fails_does_not_cost_the_others(process):
    """As one that asks for more threads than an M1 gives it."""

    def errors(variant):
        if variant == "a":
            raise ValueError("Threads per threadgroup is greater than 192")
        return {"": 0.0}

    ran = process(1.5)
    links = dict.fromkeys("ab", lambda x, _: x)
    with pytest.warns(UserWarning, match="products never run with a: Threads per threadgroup"):
        assert choose("products", "8 x 8", "5 rows", errors, 0.1, links, None, None) == "b"
    assert ran == ["timing"]
    (verdict,) = metal_kernels.VERDICTS["products, 8 x 8"].values()
    assert verdict == (
        "used, 1.50 times as fast as MLX's operation with b; not with a, Threads per threadgroup "
        "is greater than 192"
    )


APPLE = (
    "[metal::Device] Unable to build metal library from source\n"
    "program_source:57:9: error: no matching function for call to 'simdgroup_multiply_accumulate'\n"
    "note: candidate template ignored"
)


def test_the_compiler_says_why_a_kernel_is_not_used(process):
    def errors(_):
        raise RuntimeError(APPLE)

    process()
    line = "program_source:57:9: error: no matching function for call to"
    with pytest.warns(UserWarning, match=line):
        assert choose("products", "8 x 8", "5 rows", errors, 0.1) is None
    (verdict,) = metal_kernels.VERDICTS["products, 8 x 8"].values()
    assert verdict.startswith(f"not used, {line}")
    assert metal_kernels.MESSAGES == {"products, 8 x 8, 5 rows": APPLE}


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
    stand_in(monkeypatch, mx, device_info=lambda *_: info)
    files = [file_of(tmp_path, [source])]
    assert file_of(tmp_path, [source]) == files[0]
    for module, change in (
        (mx, {"device_info": lambda *_: info | {"architecture": "applegpu_g15s"}}),
        (platform, {"mac_ver": lambda: ("26.2", ("", "", ""), "")}),
        (verdicts, {"version": lambda _: "0.33"}),
    ):
        with monkeypatch.context() as patch:
            stand_in(patch, module, **change)
            files.append(file_of(tmp_path, [source]))
    source.write_text("2")
    files.append(file_of(tmp_path, [source]))
    assert len(set(files)) == 5
    with monkeypatch.context() as patch:  # a Mac gets its name from the network that it is in
        stand_in(patch, platform, node=lambda: "elsewhere")
        assert file_of(tmp_path, [source]) == files[-1]
    assert {path.parent for path in files} == {tmp_path}


def test_the_file_depends_on_all_that_is_timed(monkeypatch, tmp_path):
    """Kernels of hybrid targets, shares of the CPU and a kernel's rival have their own files.

    A kept winner that is not among the variants any more could not be checked.
    """
    seen = []
    monkeypatch.setattr(
        metal_kernels, "file_of", lambda folder, paths: seen.extend(paths) or folder / "a"
    )
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path))
    assert metal_kernels.kept_verdicts.__wrapped__().path == tmp_path / "kernels" / "a"
    names = {path.name for path in seen if path.exists()}
    assert {"products.py", "attention.py", "gated_delta.py", "hybrid.py"} <= names
    assert {"shared_products.py", "group_attention.py"} <= names


def test_one_line_says_which_kernels_are_used(process):
    process()
    loses, wins = {"5 rows": "not used, 0.90 times as fast"}, {"5 rows": "used, 1.20 times as fast"}
    found = {"products, 8 x 8": loses, "products, 9 x 9": loses | {"7 rows": wins["5 rows"]}}
    metal_kernels.VERDICTS.update(found | {"attention, 4 heads": loses})
    assert metal_kernels.summary() == "products in 1 of 2 shapes; attention in 0 of 1 shapes"
