"""The device that the backend runs on: which one it is, and why there is none."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from treeflash.errors import BackendError, CPUBuildError, first_line, is_out_of_memory

DRIVERS = {12: 525, 13: 580}
"""The oldest NVIDIA driver for each major version of CUDA (CUDA Toolkit release notes, "CUDA driver
and toolkit compatibility")."""
OLDER_WHEELS = "pip install torch --index-url https://download.pytorch.org/whl/cu126"
OLDEST_WHEELS = 12000
"""The CUDA version of the oldest driver for `OLDER_WHEELS`, as the driver numbers it."""


ALLOCATOR_SETTINGS = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
"""Variables of the environment with a user's settings of PyTorch's allocator."""
DRIVER = Path("/proc/driver/nvidia/version")
PROBED_BYTES = 32 << 20
"""More than the allocator cuts from a block of small tensors."""


def choose_device(name: str | None) -> torch.device:
    """Return the device with a name; None is the first CUDA device.

    Raises a BackendError if there is no such device.
    """
    try:
        device = torch.device(name or "cuda")
    except RuntimeError:
        raise BackendError(f"unknown device {name!r}; use cuda, cuda:1, ... or cpu") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise BackendError(f"the cuda backend runs on cuda or cpu, not on {name!r}")
    if not torch.cuda.is_available():
        reason, remedy = why_unusable()
        raise (CPUBuildError if is_for_cpus() else BackendError)(
            f"{reason}, so no CUDA device is available; use device cpu to run on the CPU, or "
            f"{remedy}"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))  # set for a process that `torchrun` started
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise BackendError(
            f"there is no cuda:{index}: this machine has {torch.cuda.device_count()} CUDA device(s)"
        )
    return torch.device("cuda", index)


def is_for_cpus() -> bool:
    """Return whether this PyTorch is built for CPUs alone."""
    return torch.version.cuda is None and torch.version.hip is None


def why_unusable() -> tuple[str, str]:
    """Return why PyTorch finds no CUDA device, and what a user can do about it."""
    if is_for_cpus():
        return (
            f"this PyTorch ({torch.__version__}) is built for CPUs alone",
            "install a PyTorch with CUDA (https://pytorch.org/get-started/locally)",
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        message = str(error)
    else:
        message = "PyTorch starts CUDA, but counts no device"
    wheel = torch.version.cuda or ""
    major = int(wheel.partition(".")[0] or 0)
    if found := re.search(r"driver .* too old \(found version (\d+)\)", message):
        supported = int(found[1])  # CUDA's version as a number: 12080 for 12.8
        needed = f" ({DRIVERS[major]} or newer)" if major in DRIVERS else ""
        older = f", or install a build for older drivers: {OLDER_WHEELS}"
        return (
            f"this PyTorch is built for CUDA {wheel}, and the NVIDIA driver supports only CUDA "
            f"{supported // 1000}.{supported % 1000 // 10}",
            f"update the driver{needed}" + (older if supported >= OLDEST_WHEELS else ""),
        )
    if "no NVIDIA driver" in message:
        return "this machine has no NVIDIA driver", "install a driver"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "No CUDA GPUs" in message and hidden is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU", "unset that variable"
    return f"CUDA does not start ({first_line(Exception(message))})", "see what nvidia-smi prints"


def join_free_memory(device: torch.device) -> None:
    """Let the allocator of a GPU join free memory, also of blocks that it has got one by one.

    Joined weights would otherwise leave holes that nothing fits into. A user's own settings are
    kept, and so are the settings of a process that already uses CUDA.
    """
    if torch.cuda.is_initialized() or any(name in os.environ for name in ALLOCATOR_SETTINGS):
        return
    settings: Any = torch._C
    settings._accelerator_setAllocatorSettings("expandable_segments:True")
    try:
        torch.empty(PROBED_BYTES, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # Some virtual GPUs, and CUDA in WSL, cannot map memory.
        settings._accelerator_setAllocatorSettings("expandable_segments:False")


def device_name(device: torch.device) -> str:
    """Return the model of a device: the GPU's, or the processor's as far as Python knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def device_facts(device: torch.device) -> dict[str, str]:
    """Return what matters about a device and the software that drives it, by name."""
    facts = {"device": device_name(device)}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        facts["capability"] = f"{major}.{minor}"
        facts["memory"] = f"{torch.cuda.mem_get_info(device)[1] / 2**30:.1f} GiB"
        facts["CUDA"] = str(torch.version.cuda or torch.version.hip)
    elif not torch.cuda.is_available():
        facts["GPU"] = f"none; {why_unusable()[0]}"
    facts["torch"] = torch.__version__
    for package in ("triton", "transformers"):
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    return facts


def driver_version() -> str:
    """Return what NVIDIA's driver tells of itself; empty without one."""
    try:
        return DRIVER.read_text(encoding="utf-8")
    except OSError:
        return ""
