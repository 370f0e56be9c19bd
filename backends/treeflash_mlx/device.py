"""The device: its choice, the limits of its memory, and what `doctor` reports about it."""

from __future__ import annotations

import atexit
import platform
import re
import subprocess
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import mlx.core as mx

from treeflash.config import GIB
from treeflash.decoding.interfaces import SAFE_SHARE
from treeflash.errors import BackendError, ConfigError, MemoryShortError
from treeflash_mlx import TF32_MAY_BE_ON
from treeflash_mlx.metal_kernels import UNTRIED, runs_matrix_kernels

CACHE_BYTES, CACHE_SHARE = GIB, 1 / 16
"""Freed memory that MLX keeps for other arrays, and its largest share of a GPU's memory. Without a
limit MLX keeps all of it, although the sizes that are needed keep changing."""
STATE_BYTES = 4 * GIB
"""Memory for the states of sequences, if it is wired."""
COMMAND_TIMEOUT_S = 5.0
PRESSURES = {"1": "normal", "2": "warning", "4": "critical"}
"""What macOS calls its levels of memory pressure."""


def on_metal() -> bool:
    """Return whether an Apple GPU computes arrays."""
    return mx.metal.is_available() and mx.default_device().type == mx.gpu


def choose_device(name: str | None) -> bool:
    """Use the device of that name, or MLX's default; returns whether it is the CPU.

    Raises a BackendError if there is no such device.
    """
    if name not in (None, "cpu", "gpu"):
        raise BackendError(f"the mlx backend runs on gpu or cpu, not on {name!r}")
    if name == "gpu" and not (mx.metal.is_available() or mx.cuda.is_available()):
        raise BackendError("this MLX has no GPU; use device cpu")
    if name is not None:
        mx.set_default_device(mx.Device(getattr(mx, name)))
    return mx.default_device().type == mx.cpu


def available_bytes() -> int | None:
    """Return the bytes that macOS recommends to use on the GPU; None on other devices."""
    if not on_metal():
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


def memory_limit() -> int | None:
    """Return the bytes that models may take on the GPU; None on other devices."""
    available = available_bytes()
    return None if available is None else int(SAFE_SHARE * available)


def limit_cache() -> None:
    """Limit the freed memory that MLX keeps on a GPU, before anything is loaded.

    MLX's limit of all memory stays where it is, at 1.5 times what macOS recommends: `refuse_size`
    and the admission of sequences keep below. If other programs then need the memory, macOS
    compresses and swaps what is not wired: calls take longer, and none fails. The level of this
    pressure is among the `device_facts`.
    """
    if mx.default_device().type == mx.cpu:
        return
    available = available_bytes()
    mx.set_cache_limit(
        CACHE_BYTES if available is None else min(CACHE_BYTES, int(CACHE_SHARE * available))
    )


def wire_memory(weights: int) -> None:
    """Keep all `weights` (bytes) and the states of sequences in memory, whatever others need.

    macOS has crashed where this limit was high, so it is as low as possible and taken back when
    the process ends.
    """
    if (available := available_bytes()) is not None:
        previous = mx.set_wired_limit(min(weights + STATE_BYTES + GIB, available))
        atexit.register(mx.set_wired_limit, previous)


def refuse_size(files: Collection[Path], limit: int, taken: int) -> None:
    """Raise a ConfigError if the files of models have more than `limit` bytes.

    Loading them would make macOS swap for minutes, and then fail. A MemoryShortError is raised if
    other models and their sequences have `taken` too many of these bytes.
    """
    size = sum(file.stat().st_size for file in files)
    if limit - taken < size <= limit:
        raise MemoryShortError(
            f"the models' files have {size / GIB:.1f} GiB, and other models leave "
            f"{max(limit - taken, 0) / GIB:.1f} GiB of this GPU's memory"
        )
    if size > limit:
        raise ConfigError(
            f"the models' files have {size / GIB:.1f} GiB, and this GPU has "
            f"{limit / GIB:.1f} GiB for models and texts; use a conversion in "
            "fewer bits, such as -4bit, or a smaller model (--force loads them nevertheless)"
        )


def warn_of_size(weights: int) -> None:
    """Warn if models of `weights` bytes leave the GPU no memory for the states of sequences."""
    available = available_bytes()
    if available is not None and weights > SAFE_SHARE * available:
        warnings.warn(
            f"the models take {weights / GIB:.1f} GiB of the {available / GIB:.1f} GiB that macOS "
            "recommends to use on the GPU; use a smaller model or fewer bits",
            stacklevel=3,
        )


def warn_of_tf32(may_be_on: bool = TF32_MAY_BE_ON) -> None:
    """Warn if a GPU may round float32 products to TF32."""
    if may_be_on:
        warnings.warn(
            "MLX was imported before treeflash_mlx and may compute in TF32, where drafting can "
            "change tokens; set MLX_ENABLE_TF32=0 in the environment",
            stacklevel=3,
        )


def device_facts() -> dict[str, str]:
    """List the chip, its GPU cores, macOS, the memory and its limits; less on other systems."""
    info = mx.device_info()
    facts = {"chip": str(info["device_name"])}
    if cores := re.search(r'"gpu-core-count" = (\d+)', _output(["ioreg", "-rc", "AGXAccelerator"])):
        facts["GPU cores"] = cores[1]
    if macos := platform.mac_ver()[0]:
        facts["macOS"] = macos
    if (memory := info.get("memory_size")) is not None:
        facts["memory"] = f"{int(memory) / GIB:.0f} GiB"
    if (available := available_bytes()) is not None:
        facts["for the GPU"] = f"{available / GIB:.1f} GiB"
        limit = _output(["sysctl", "-n", "iogpu.wired_limit_mb"]).strip()
        facts["wired limit"] = "set by macOS" if limit in ("", "0") else f"{limit} MiB"
        if swap := re.search(r"used = (\S+)", _output(["sysctl", "-n", "vm.swapusage"])):
            facts["swap in use"] = swap[1]
        level = _output(["sysctl", "-n", "kern.memorystatus_vm_pressure_level"]).strip()
        if level in PRESSURES:
            facts["memory pressure"] = PRESSURES[level]
        if not runs_matrix_kernels():
            name = info.get("architecture")
            facts["kernels"] = (
                f"treeflash's for products and attention are not tried on this GPU ({name}); "
                f"{UNTRIED}=1 in the environment tries them"
            )
    return facts


def _output(command: Sequence[str]) -> str:
    """Return a command's output; empty where the command is missing or fails."""
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout
