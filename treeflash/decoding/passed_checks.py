"""Checks at load that a target has passed, kept from one process to the next.

A check takes seconds and finds the same until something changes that it depends on:

- the files of the models and the adapter: their paths, inodes, sizes and times;
- how they are loaded: all settings of `LoadConfig`, the backend and the device;
- the sources of treeflash and of the backend, and the versions of the frameworks;
- the processor, and what the backend tells of a GPU and its driver;
- variables of the environment that choose kernels or limit a processor's instructions.

A hash of all of them is the name of a file that lists the checks that passed. The number of threads
that treeflash chooses itself is left out: it changes no bit in exact mode, and in other modes less
than any check tolerates. What failed is never kept, so a target that is refused is checked again by
every process.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from treeflash.config import LoadConfig, remember
from treeflash.processors import processor_facts

MODEL_FILES = ("*.json", "*.safetensors")
PACKAGES = (
    *("treeflash", "numpy", "torch", "transformers", "triton", "llvmlite"),
    *("mlx", "mlx-lm", "mlx-vlm"),
)
VARIABLES = (
    *("ATEN_", "BLIS_", "CUBLAS", "CUDA_", "CUDNN_", "DNNL_", "DYLD_", "GOMP_", "KMP_"),
    *("LD_PRELOAD", "METAL_", "MKL", "MLX_", "MTL_", "NVIDIA_", "OMP_", "ONEDNN_", "OPENBLAS_"),
    *("PYTORCH_", "TORCH", "TREEFLASH_", "TRITON_", "VECLIB_"),
)
"""The beginnings of names of variables that may choose other kernels."""
IRRELEVANT = "TREEFLASH_CACHE"
"""The variable with such a beginning that chooses none."""


class PassedChecks:
    """What checks found, by name, in a file; without a path nothing is kept."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._found = _read(path)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def add(self, name: str, found: int = 1) -> None:
        """Keep that a check passed; that the file cannot be written is not an error."""
        if self._path is not None:
            # Another process may have passed another check meanwhile.
            self._found |= _read(self._path) | {name: found}
            remember(self._path, json.dumps({"passed": self._found}, sort_keys=True))

    def find(self, name: str, check: Callable[[], int]) -> int:
        """Return the number that a check found when it passed, or finds now."""
        if name not in self._found:
            found = check()
            self.add(name, found)
            return found
        return self._found[name]


def passed_checks(
    folder: Path | None,
    models: Iterable[Path | None],
    config: LoadConfig,
    package: str,
    facts: Sequence[object],
) -> PassedChecks:
    """Find the checks that models passed when a backend ran them as now; `folder` keeps them.

    Args:
        folder: the folder of the cache; None keeps nothing.
        models: the folders of the target, the drafter and the adapter.
        config: the settings of the load.
        package: the backend's package.
        facts: what tells the device, and settings of the framework that choose kernels.
    """
    if folder is None:
        return PassedChecks()
    known = {
        "models": [_files(path, MODEL_FILES) for path in models if path is not None],
        "backend": [str(fact) for fact in facts],
        **run_facts(config, package),
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return PassedChecks(folder / f"{digest[:32]}.json")


def run_facts(config: LoadConfig, package: str) -> dict[str, object]:
    """Return what a package that runs a model depends on besides the model and the device."""
    return {
        "settings": str(asdict(replace(config, checks=None))),
        "package": package,
        "sources": [_sources(name) for name in ("treeflash", package)],
        "versions": [_version(name) for name in PACKAGES],
        "machine": [platform.platform(), sys.version, *processor_facts()],
        "environment": _environment(),
    }


def _read(path: Path | None) -> dict[str, int]:
    """Read what a file keeps; nothing if it is missing or damaged."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        if path is not None:
            found = json.loads(path.read_text(encoding="utf-8"))["passed"]
            return {str(name): int(number) for name, number in found.items()}
    return {}


def _files(folder: Path, patterns: Iterable[str]) -> list[tuple[str, int, int, int, int]]:
    """List the files of a folder, each with what changes when its content does."""
    found = []
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        real, status = path.resolve(), path.stat()
        times = status.st_mtime_ns, status.st_ctime_ns
        found.append((str(real), status.st_ino, status.st_size, *times))
    return found


def _sources(package: str) -> list[tuple[str, int, int, int, int]]:
    """List the source files of a package, or the file of a module: its neighbours are others'."""
    module = importlib.import_module(package)
    if (folders := getattr(module, "__path__", None)) is not None:
        return [found for folder in folders for found in _files(Path(folder), ("**/*.py",))]
    file = getattr(module, "__file__", None)  # interactive sessions have none
    return [] if file is None else _files(Path(file).parent, (Path(file).name,))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(VARIABLES) and name != IRRELEVANT
    }
