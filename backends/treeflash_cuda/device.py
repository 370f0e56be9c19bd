"""The device that the backend runs on: which one it is, and why there is none."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from treeflash.config import GIB, LoadConfig
from treeflash.errors import BackendError, CPUBuildError, first_line, is_out_of_memory

CPU = "cpu"
"""The name of the device that has a backend's name of its own."""

DRIVERS = {12: 525, 13: 580}
"""The oldest NVIDIA driver for each major version of CUDA (CUDA Toolkit release notes, "CUDA driver
and toolkit compatibility")."""
OLDER_WHEELS = (
    "pip install --force-reinstall {packages} --index-url https://download.pytorch.org/whl/cu126"
)
"""The command for the last builds of PyTorch that drivers before CUDA 13 run."""
OLDER_TORCH = "'torch==2.14.*'"
OLDEST_WHEELS = 12000
"""The CUDA version of the oldest driver for `OLDER_WHEELS`, as the driver numbers it."""
NEWEST_OF_OLDER = 9, 0
"""The newest compute capability that `OLDER_WHEELS` have code for."""


ALLOCATOR_SETTINGS = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
"""Variables of the environment with a user's settings of PyTorch's allocator."""
DRIVER = Path("/proc/driver/nvidia/version")
SMI_S = 10
"""Seconds that nvidia-smi may take."""
ROUNDED_SIZE = 128
"""Rows and columns of a product that a GPU's tensor cores would compute."""
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


def choose_cpu(name: str | None) -> torch.device:
    """Return the CPU; raises a BackendError for the name of another device."""
    if name not in (None, CPU):
        raise BackendError(
            f"the cpu backend runs on the CPU alone, not on {name!r}; remove the device, or use "
            "the cuda backend"
        )
    return torch.device(CPU)


def on_cpu(config: LoadConfig) -> LoadConfig:
    """Return a configuration with the CPU; raises a BackendError if it has another device."""
    choose_cpu(config.device)
    return replace(config, device=CPU)


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
        remedies = [f"update the driver{needed}"]
        if supported >= OLDEST_WHEELS:
            remedies.append(
                f"on a GPU for data centres install NVIDIA's cuda-compat-{wheel.replace('.', '-')}"
            )
            if max(capabilities(), default=NEWEST_OF_OLDER) <= NEWEST_OF_OLDER:
                remedies.append(f"install a build for older drivers: {older_wheels()}")
        return (
            f"this PyTorch is built for CUDA {wheel}, and the NVIDIA driver supports only CUDA "
            f"{supported // 1000}.{supported % 1000 // 10}",
            ", or ".join(remedies),
        )
    if "no NVIDIA driver" in message:
        return "this machine has no NVIDIA driver", "install a driver"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "No CUDA GPUs" in message and hidden is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU", "unset that variable"
    return f"CUDA does not start ({first_line(Exception(message))})", "see what nvidia-smi prints"


def older_wheels() -> str:
    """Return the command that replaces PyTorch, and torchvision if it is there."""
    others = ["torchvision"] if find_spec("torchvision") else []
    return OLDER_WHEELS.format(packages=" ".join([OLDER_TORCH, *others]))


def capabilities() -> list[tuple[int, int]]:
    """Return the compute capabilities of the GPUs that a driver knows; none if it does not say."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=SMI_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [(int(x), int(y)) for x, y in re.findall(r"^(\d+)\.(\d+)$", done.stdout, re.MULTILINE)]


def prepare(device: torch.device) -> None:
    """Choose the settings of PyTorch for a GPU, before anything uses it; a CPU has none.

    Raises a BackendError if PyTorch has no code for the GPU, or rounds float32 numbers.
    """
    if device.type != "cuda":
        return
    join_free_memory(device)
    check_architecture(device)
    warn_of_others(device)
    # Products that are split would otherwise add their parts in half precision.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    keep_float32(device)


def check_architecture(device: torch.device) -> None:
    """Raise a BackendError if this PyTorch has no code for a GPU."""
    capability = torch.cuda.get_device_capability(device)
    compiled = torch.cuda.get_arch_list()
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)", name) for name in compiled]
    known = [(x[1], (int(x[2]), int(x[3]))) for x in found if x is not None]
    # Code of a compute capability runs on later ones of its major version; PTX on all later ones.
    runs = any(
        each <= capability and (kind == "compute" or each[0] == capability[0])
        for kind, each in known
    )
    if known and not runs:
        is_older = capability < min(each for _, each in known)
        remedy = older_wheels() if is_older else "install a newer PyTorch"
        raise BackendError(
            f"this PyTorch has no code for {device_name(device)} (compute capability "
            f"{capability[0]}.{capability[1]}), only for {', '.join(compiled)}; use device cpu to "
            f"run on the CPU, or {remedy}"
        )


def keep_float32(device: torch.device) -> None:
    """Let products of float32 numbers keep all bits, which TF32 does not.

    NVIDIA's containers set a variable for TF32. Kernels are compared with such products, and plain
    decoding with trees. Raises a BackendError if products are rounded nevertheless.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    x = torch.full((ROUNDED_SIZE, ROUNDED_SIZE), 1 + 2.0**-12, device=device)
    if float((x @ torch.eye(ROUNDED_SIZE, device=device) - x).abs().max()):
        raise BackendError(
            "products of float32 numbers are rounded to TF32 on this GPU; unset "
            "NVIDIA_TF32_OVERRIDE, and whatever else turns TF32 on"
        )


def join_free_memory(device: torch.device) -> None:
    """Let the allocator of a GPU join free memory, also of blocks that it has got one by one.

    Joined weights would otherwise leave holes that nothing fits into. A user's own settings are
    kept, and so are the settings of a process that already uses CUDA.
    """
    # NCCL would register the memory of captured calls as one piece each, and joined memory has
    # several: Megatron-LM asserts this for the same reason.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
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


def warn_of_others(device: torch.device) -> None:
    """Warn if less than half of a GPU's memory is free before a model is loaded."""
    torch.cuda.empty_cache()  # what this process no longer uses
    free, total = torch.cuda.mem_get_info(device)
    if free < total / 2:
        warnings.warn(
            f"only {free / GIB:.1f} of {total / GIB:.1f} GiB of {device} are free: other programs, "
            "or models that this one has loaded, hold the rest; models hold less with memory_gb",
            stacklevel=2,
        )


def device_name(device: torch.device) -> str:
    """Return the model of a device: the GPU's, or the processor's as far as Python knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def one_of_each_kind(devices: Sequence[torch.device]) -> list[torch.device]:
    """Return the first device of each kind, by name: kernels run alike on all of a kind."""
    kinds: dict[str, torch.device] = {}
    for device in devices:
        kinds.setdefault(device_name(device), device)
    return list(kinds.values())


def backend_name(device: torch.device) -> str:
    """Return the name of the backend that a device has, however it was chosen."""
    return CPU if device.type == CPU else "cuda"


def device_facts(device: torch.device) -> dict[str, str]:
    """Return what matters about a device and the software that drives it, by name."""
    facts = {"backend": backend_name(device), "device": device_name(device)}
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
