"""Which accelerators of this machine can be used, and why the others cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.testing import require
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response

PAIR_GB = 0.125
"""GiB for keys and values of a tiny pair: tests keep dozens of them on one GPU."""


def cuda_problem() -> str | None:
    """Return why no CUDA device can be used; None if one can."""
    if find_spec("torch") is None:
        return "PyTorch is not installed"
    from treeflash_cuda.device import choose_device

    from treeflash.errors import BackendError

    try:
        choose_device("cuda")
    except BackendError as error:
        return str(error)
    return None


def need_cuda() -> Any:
    """Return the GPU, a device of PyTorch; skip the test if there is none."""
    require("torch")
    if problem := cuda_problem():
        pytest.skip(problem)
    from treeflash_cuda.device import choose_device

    return choose_device(None)


def need_metal() -> None:
    """Skip the test if there is no Metal device."""
    require("mlx.core")
    if problem := metal_problem():
        pytest.skip(problem)


def load_cuda(target: Path, drafter: Path | None, config: LoadConfig) -> Any:
    """Load a tiny pair on a GPU that others use too; skip the test if there is no GPU."""
    need_cuda()
    from treeflash_cuda.backend import load

    with warnings.catch_warnings():
        # The suite keeps many pairs, and a card may have other programs.
        warnings.filterwarnings("ignore", "only .* GiB of .* are free")
        return load(target, drafter, replace(config, memory_gb=PAIR_GB))


def first_loss(target: Path, output: Path, load: LoadConfig) -> float:
    """Return the loss of the first step of training on random texts."""
    from treeflash_cuda.training.entry import train

    ids = np.random.default_rng(2).integers(3, 24, (4, 40)).tolist()
    texts = [Response(prompt_ids=tuple(x[:10]), response_ids=tuple(x[10:])) for x in ids]
    config = TrainConfig(
        layers=1,
        block_size=5,
        top_tokens=8,
        sequences=2,
        anchors=8,
        steps=1,
        validation_sequences=0,
    )
    records = train(target, texts, output, config, load)
    return next(float(record["loss"]) for record in records if "step" in record)


def metal_problem() -> str | None:
    """Return why Metal cannot be used; None if it can."""
    if find_spec("mlx") is None:
        return "MLX is not installed"
    import mlx.core as mx

    return None if mx.metal.is_available() else "MLX finds no Metal device"


class MetalKernels:
    """Makes kernels for the GPU, as `mx.fast.metal_kernel` does, and counts how often they run.

    It stands where `metal_executor.MetalExecutor` stands on machines without Metal.

    Attributes:
        launches: how often each kernel was run, by name.
        rounding: relative errors of results, by dtype.
    """

    def __init__(self) -> None:
        import mlx.core as mx
        from treeflash_mlx.metal_kernels import ROUNDING

        self._make, self.rounding = mx.fast.metal_kernel, ROUNDING
        self.launches: dict[str, int] = {}

    def metal_kernel(self, name: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """See `mx.fast.metal_kernel`."""
        kernel = self._make(name, *args, **kwargs)

        def launch(**settings: Any) -> Any:
            self.launches[name] = self.launches.get(name, 0) + 1
            return kernel(**settings)

        return launch
