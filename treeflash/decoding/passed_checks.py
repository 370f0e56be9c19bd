"""Checks at load that a target has passed, kept from one process to the next.

A check takes seconds and finds the same until something changes that it depends on:

- the files of the models and the adapter: their paths, inodes, sizes and times;
- how they are loaded: all settings of `LoadConfig`, the backend, the device and the data type;
- the sources of treeflash and of the backend, and the versions of the frameworks;
- the processor, and what the backend tells of a GPU and its driver;
- variables of the environment that choose kernels or limit a processor's instructions.

A hash of all of them is the name of a file that lists the checks that passed. The number of threads
is left out: it changes no bit in exact mode, and in other modes less than any check tolerates. What
failed is never kept, so a target that is refused is checked again by every process.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from treeflash.config import LoadConfig, remember
from treeflash.decoding.interfaces import device_report
from treeflash.processors import processor_facts

MODEL_FILES = ("*.json", "*.safetensors")
PACKAGES = ("treeflash", "numpy", "torch", "transformers", "triton", "mlx", "mlx-lm", "mlx-vlm")
VARIABLES = (
    *("ATEN_", "BLIS_", "CUBLAS", "CUDA_", "CUDNN_", "DNNL_", "DYLD_", "GOMP_", "KMP_"),
    *("LD_PRELOAD", "METAL_", "MKL", "MLX_", "MTL_", "NVIDIA_", "OMP_", "ONEDNN_", "OPENBLAS_"),
    *("PYTORCH_", "TORCH", "TREEFLASH_", "TRITON_", "VECLIB_"),
)
"""The beginnings of names of variables that may choose other kernels."""
IRRELEVANT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TREEFLASH_CACHE")
"""Variables with such beginnings that choose none."""


class PassedChecks:
    """The names of checks in a file; without a path nothing is kept."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._names = _read(path)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        """Keep that a check passed; that the file cannot be written is not an error."""
        if self._path is not None:
            # Another process may have passed another check meanwhile.
            self._names |= _read(self._path) | {name}
            remember(self._path, json.dumps({"passed": sorted(self._names)}))


def passed_checks(
    folder: Path | None, models: Iterable[Path | None], config: LoadConfig, backend: Any
) -> PassedChecks:
    """Find the checks that these models have passed on a loaded backend; `folder` keeps them."""
    if folder is None:
        return PassedChecks()
    modules = ("treeflash", type(backend).__module__.partition(".")[0])
    facts = {
        "models": [_files(path, MODEL_FILES) for path in models if path is not None],
        "settings": {
            name: str(value) for name, value in asdict(config).items() if name != "checks"
        },
        "backend": [backend.name, str(backend.device), backend.dtype, *backend.kernel_facts],
        # Kernels that are timed at load may win this time and lose the next.
        "kernels": sorted(
            (kernel, size)
            for kernel, verdicts in device_report(backend).kernels.items()
            for size, verdict in verdicts.items()
            if verdict.startswith("used")
        ),
        "sources": [_files(_folder_of(name), ("**/*.py",)) for name in modules],
        "versions": [_version(name) for name in PACKAGES],
        "machine": [platform.platform(), sys.version, *processor_facts()],
        "environment": _environment(),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return PassedChecks(folder / f"{digest[:32]}.json")


def _read(path: Path | None) -> set[str]:
    """Read the names in a file; none if it is missing or damaged."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        if path is not None:
            names = json.loads(path.read_text(encoding="utf-8"))["passed"]
            return {name for name in names if isinstance(name, str)}
    return set()


def _files(folder: Path, patterns: Iterable[str]) -> list[tuple[str, int, int, int, int]]:
    """List the files of a folder, each with what changes when its content does."""
    found = []
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        real, status = path.resolve(), path.stat()
        times = status.st_mtime_ns, status.st_ctime_ns
        found.append((str(real), status.st_ino, status.st_size, *times))
    return found


def _folder_of(package: str) -> Path:
    return Path(str(importlib.import_module(package).__file__)).parent


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(VARIABLES) and name not in IRRELEVANT
    }
