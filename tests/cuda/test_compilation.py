"""What users are told about the compilation of Triton kernels."""

import logging
import subprocess

import pytest

from treeflash.testing import require

require("triton")

import torch
from treeflash_cuda import operations
from treeflash_cuda.gpu import compilation
from treeflash_cuda.gpu.compilation import compiling_announced, reason_of, toolchain_problems
from treeflash_cuda.operations import Operations, checked, examined_shapes
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
    monkeypatch.setattr(compilation, "python_header", lambda: header)

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
    monkeypatch.setattr(knobs.compilation, "listener", lambda **facts: found.append(facts))
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

    monkeypatch.setattr(operations, "checked", compiles)
    before = knobs.compilation.listener
    with caplog.at_level(logging.WARNING):
        operations.load_operations(examined_shapes(64), torch.device("cpu"), torch.float32)
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
