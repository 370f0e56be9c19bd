"""Puts the executor in the place of MLX's Metal backend."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterable

import mlx.core as mx
import pytest
from stand_ins import stand_in
from treeflash_mlx import hybrid, metal_kernels
from treeflash_mlx.metal_kernels import attention
from treeflash_mlx.metal_kernels.verdicts import KeptVerdicts

from metal_executor.execution import MetalExecutor, MetalKernel

# Modules of mlx-lm that make their kernels when they are imported, and none where Metal is not.
MODULES = ("mlx_lm.models.gated_delta", "mlx_lm.models.ssm")
DEVICE_INFO = {
    "architecture": "applegpu_g16s",
    "device_name": "Executor of Metal kernels",
    "max_buffer_length": 2**34,
    "max_recommended_working_set_size": 2**34,
    "memory_size": 2**35,
    "resource_limit": 499000,
}
MAX_THREADS = 448
"""Threads of a threadgroup that M1 and M2 allow every kernel."""


def install(
    executor: MetalExecutor,
    patch: pytest.MonkeyPatch,
    modules: Iterable[str] = MODULES,
) -> None:
    """Let code see an MLX with Metal, whose custom kernels the executor runs.

    `mx.metal.is_available` and `mx.default_device` answer as on a Mac. Arrays and all other
    operations stay on the CPU.

    Args:
        executor: runs the kernels.
        patch: takes everything back.
        modules: those that make kernels when they are imported; they get them now.
    """
    importlib.import_module("mlx_lm.generate")  # makes a stream of the default device
    imported = [importlib.import_module(name) for name in modules]
    stand_in(patch, mx.metal, is_available=lambda: True)
    stand_in(
        patch,
        mx,
        default_device=lambda: mx.Device(mx.gpu),
        device_info=lambda *_: dict(DEVICE_INFO),
        set_wired_limit=lambda _: 0,
    )
    stand_in(patch, mx.fast, metal_kernel=executor.metal_kernel)
    stand_in(
        patch,
        metal_kernels,
        speedup=lambda *timed: executor.speedup(*timed),
        VERDICTS={},
        MESSAGES={},
        kept_verdicts=lambda: KeptVerdicts(None),
    )
    executor.max_threads = MAX_THREADS
    hybrid.delta_kernel_wins.cache_clear()
    attention.winning_columns.cache_clear()
    attention.exact_columns.cache_clear()
    for module in imported:
        stand_in(patch, module, **kernels_of(module))


def kernels_of(module: types.ModuleType) -> dict[str, MetalKernel]:
    """The kernels that a module makes when it is imported, by the names that it gives them."""
    # Its code runs once more, in another namespace; classes and functions stay the old ones.
    spec = module.__spec__
    assert spec is not None
    assert spec.loader is not None
    fresh = types.ModuleType(module.__name__)
    fresh.__dict__.update(__package__=module.__package__, __file__=module.__file__, __spec__=spec)
    spec.loader.exec_module(fresh)
    return {name: x for name, x in vars(fresh).items() if isinstance(x, MetalKernel)}
