"""The entry point of the PyTorch backend `cpu`: the backend `cuda` with the device cpu."""

from __future__ import annotations

from pathlib import Path

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import DeviceReport
from treeflash_cuda import backend, target_loading
from treeflash_cuda.backend import CudaBackend, check_drafter, drafter_replacer
from treeflash_cuda.device import CPU, choose_cpu, on_cpu

__all__ = [
    "bits_refusal",
    "check_config",
    "check_drafter",
    "choose_device",
    "drafter_replacer",
    "examine_device",
    "load",
]

choose_device = choose_cpu


def check_config(config: LoadConfig) -> None:
    """Raise a ConfigError for settings that this backend lacks."""
    backend.check_config(on_cpu(config), CPU)


def bits_refusal(config: LoadConfig) -> str | None:
    return target_loading.bits_refusal(on_cpu(config))


def examine_device(config: LoadConfig) -> DeviceReport:
    return backend.examine_device(on_cpu(config))


def load(target: Path, drafter: Path | None, config: LoadConfig) -> CudaBackend:
    check_config(config)
    return backend.load(target, drafter, on_cpu(config))
