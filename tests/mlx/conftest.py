"""Fixtures of the MLX backend's tests."""

import json
from functools import cache

import numpy as np
import pytest
from accelerators import MetalKernels, metal_problem
from families import write_pair as write_pair_of
from stand_ins import stand_in

from treeflash.testing.models import write_pair


@pytest.fixture
def see_device(monkeypatch):
    """Let code see MLX on a device (`mx.cpu`, `mx.gpu`) from now on; arrays stay on the CPU.

    A GPU may have the name of an architecture.
    """
    import mlx.core as mx

    def see(kind, architecture=None):
        info = {"device_info": lambda *_: {"architecture": architecture}} if architecture else {}
        stand_in(monkeypatch, mx.metal, is_available=lambda: kind == mx.gpu)
        stand_in(monkeypatch, mx, default_device=lambda: mx.Device(kind), **info)

    return see


@pytest.fixture(scope="session")
def families():
    """The module that writes random models of any type of mlx-lm."""
    from families import mlx

    return mlx


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a tiny Qwen3 and a TreeFlash drafter for it, wide enough to be quantised."""
    folder = tmp_path_factory.mktemp("pair")
    return write_pair(folder, "qwen3", hidden_size=128, vocab_size=64, layers=3)


@pytest.fixture(scope="session")
def quantised_pair(pair, tmp_path_factory):
    """`pair`, with weights of 4 bits in the target's files."""
    from mlx_lm.utils import load_model, quantize_model, save_model

    target, drafter = tmp_path_factory.mktemp("quantised"), pair[1]
    model, config = quantize_model(*load_model(pair[0]), 32, 4)
    save_model(target, model)
    (target / "config.json").write_text(json.dumps(config))
    return target, drafter


@pytest.fixture(scope="session")
def hybrid_pair_of(families, tmp_path_factory):
    """Folders of a random target of a type and of a drafter for it, each made once."""
    return cache(
        lambda name, **fields: write_pair_of(
            families, tmp_path_factory.mktemp(name), name, **fields
        )
    )


@pytest.fixture
def rng():
    """A random generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def executor(kept_folder):
    """Runs Metal kernels on the CPU; MLX itself stays as it is."""
    from metal_executor import MetalExecutor, require_compiler

    require_compiler()
    return MetalExecutor(kept_folder("metal_kernels"))


@pytest.fixture
def metal(executor, monkeypatch):
    """The executor in the place of MLX's Metal backend, until the test ends."""
    from metal_executor import install

    install(executor, monkeypatch)
    return executor


@pytest.fixture(params=["executor", pytest.param("device", marks=pytest.mark.device)])
def runner(request, monkeypatch):
    """What runs Metal kernels: the executor, and with `-m device` the GPU."""
    if request.param == "executor":
        return request.getfixturevalue("metal")
    if problem := metal_problem():
        pytest.skip(problem)
    import mlx.core as mx

    kernels = MetalKernels()
    stand_in(monkeypatch, mx.fast, metal_kernel=kernels.metal_kernel)
    return kernels


@pytest.fixture
def finds_fault(metal, recwarn):
    """Whether a fault in kernels whose names begin so is found: by the executor, or by a check.

    `refuses` makes the check at load, returns whether no kernel is used, and warns.
    """
    from metal_executor import ASCENDING, MetalKernelError

    def finds(name, right, wrong, refuses, warning):
        metal.schedules = (ASCENDING,)  # the others are slow
        metal.faults.append((name, right, wrong))
        try:
            found = refuses() and warning in str(recwarn.pop().message)
        except MetalKernelError:
            found = True
        assert metal.planted, "no kernel has this text"
        return found

    return finds
