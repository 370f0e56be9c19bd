"""The compilation of Triton kernels: what users are told, and what it gives for GPUs."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import stand_in

from treeflash.testing import require

require("triton")

import torch
from treeflash_cuda.gpu import compilation, kernel_loading
from treeflash_cuda.gpu.compilation import compiling_announced, reason_of, toolchain_problems
from treeflash_cuda.gpu.kernel_loading import checked, examined_shapes
from treeflash_cuda.operations import Operations
from triton import knobs

FAILED = subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c", "-shared"])


def test_a_missing_compiler_and_header_are_lines(tmp_path):
    assert len(list(toolchain_problems(None, tmp_path / "Python.h"))) == 2
    (tmp_path / "Python.h").touch()
    assert list(toolchain_problems("/usr/bin/cc", tmp_path / "Python.h")) == []


def test_a_missing_header_is_the_reason_of_a_failed_compiler(monkeypatch, tmp_path):
    """The compiler prints it, and Triton's error has a command and an exit status alone."""
    header = tmp_path / "Python.h"
    monkeypatch.setenv("CC", "/usr/bin/cc")
    stand_in(monkeypatch, compilation, python_header=lambda: header)

    def failing(*_, **__):
        raise FAILED

    kernels = Operations(gated=failing)
    found = checked(kernels, examined_shapes(64), torch.device("cpu"), torch.float32)
    assert found.verdicts == {
        "gated": f"Triton finds no {header}, so no kernel can be used: install python3-dev"
    }
    header.touch()
    assert reason_of(FAILED).endswith("fails; see what this prints: /usr/bin/gcc main.c -shared")
    assert reason_of(ValueError("one\ntwo")) == "one"


@pytest.fixture
def listened(monkeypatch):
    """Facts that a user's own listener gets."""
    found = []
    stand_in(monkeypatch, knobs.compilation, listener=lambda **facts: found.append(facts))
    compilation.announce_compiling.cache_clear()
    yield found
    compilation.announce_compiling.cache_clear()


def test_compiling_is_announced_once_and_kept_kernels_are_not(listened, caplog, monkeypatch):
    """As Triton calls its listener."""
    facts = {"src": None, "metadata": {}, "metadata_group": {}, "times": None}

    def compiles(kernels, *_):
        for cache_hit in (True, False, False):
            assert len(caplog.records) == (len(listened) > 1)
            knobs.compilation.listener(**facts, cache_hit=cache_hit)
        return kernels

    stand_in(monkeypatch, kernel_loading, checked=compiles)
    before = knobs.compilation.listener
    with caplog.at_level(logging.WARNING):
        kernel_loading.load_operations(examined_shapes(64), torch.device("cpu"), torch.float32)
    assert [x.getMessage() for x in caplog.records] == [
        "compiling Triton kernels, once on this machine for each kind of model"
    ]
    assert [x["cache_hit"] for x in listened] == [True, False, False]
    assert knobs.compilation.listener is before


def test_the_listener_is_taken_back_after_an_error(listened):
    before = knobs.compilation.listener

    def fail():
        with compiling_announced():
            assert knobs.compilation.listener is not before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert knobs.compilation.listener is before


ROOT = Path(__file__).parents[2]
COMPILED = {
    "shared_positions",
    "own_positions",
    "rms_norm",
    "gated",
    "rotate_and_store",
    "linear",
    "add_parts",
    "grouped_linear",
    "sample",
    "write_log_probs",
    "sum_parts",
    "draft_noise",
    "tree_recurrence",
    "commit_recurrence",
    "convolve_paths",
    "move_columns",
}
PAIRS = [
    (120, "gemma-2-9b"),  # the least shared memory, and the widest heads
    *((capability, "qwen3-8b") for capability in (75, 80, 86, 89, 90, 100, 120)),
    (75, "llama-3.2-1b"),
    (90, "llama-3.2-1b"),
    (120, "llama-3.2-1b"),
    *((capability, "qwen3-8b in float32") for capability in (80, 90)),
]


# The compiler takes a minute for each; Triton's interpreter runs the same kernels every time.
@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for CUDA is for Linux")
@pytest.mark.parametrize(("capability", "model"), PAIRS)
def test_kernels_fit_the_gpu_and_spill_nothing(module, capability, model, tmp_path):
    shared_memory = module("kernels").SHARED_MEMORY
    assert set(shared_memory) == {x for x, _ in PAIRS}
    file = tmp_path / "out.json"
    command = ["-m", "benchmarks.kernels", "--json", str(file), "--capability", str(capability)]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, "--model", model],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    usages = json.loads(file.read_text())["rows"]
    assert {usage["kernel"] for usage in usages} == COMPILED
    for usage in usages:
        assert usage["registers"] > 0, usage
        assert usage["spilled_bytes"] == 0, usage
        assert usage["shared_bytes"] <= shared_memory[capability], usage
