"""Backends by name. Each is an entry point, which is imported when it is used."""

from __future__ import annotations

import inspect
import logging
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Backend, DeviceReport, Loader
from treeflash.drafters.format import Config
from treeflash.drafters.loading import check_drafter
from treeflash.errors import BackendError, CPUBuildError, first_line

T = TypeVar("T")

BACKEND_ENTRY_POINTS = "treeflash.backends"
_FRAMEWORKS = {
    "cpu": ("torch", "transformers"),
    "cuda": ("torch", "transformers"),
    "mlx": ("mlx", "mlx_lm"),
}


def available(group: str = BACKEND_ENTRY_POINTS) -> dict[str, EntryPoint]:
    """Return the entry points of a group, installed or not; a BackendError if two have one name."""
    entries: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        first = entries.setdefault(entry.name, entry)
        if first.value != entry.value:
            raise BackendError(
                f"backend {entry.name!r} is registered twice, by {first.value} and "
                f"{entry.value}; uninstall one of the two packages"
            )
    return entries


def installed(name: str) -> bool:
    return not _missing_packages(name)


def _missing_packages(name: str) -> list[str]:
    return [package for package in _FRAMEWORKS.get(name, ()) if find_spec(package) is None]


def default_backend() -> str:
    """Choose the best installed backend: mlx on Apple silicon, else cuda, mlx or reference.

    `cuda` becomes `cpu` where it finds no GPU; see `fall_back_to_cpu`.
    """
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    order = ("mlx", "cuda") if apple else ("cuda", "mlx")
    return next((name for name in order if installed(name)), "reference")


def loader(name: str) -> Loader:
    """Import the `Loader` of a backend; raises what `load_entry_point` does."""
    return cast(Loader, load_entry_point(name, available()))


def _ask(load: Loader, name: str, *arguments: Any) -> Any:
    """Call an optional function of a backend's module, see `Loader`; None if there is none."""
    function = getattr(inspect.getmodule(load), name, None)
    return None if function is None else function(*arguments)


def check_config(load: Loader, config: LoadConfig, *, named: bool = False) -> None:
    """Let a backend refuse settings, and a device that is not there, before models are fetched.

    Unless the user `named` the backend, a missing default device is no error here; see
    `fall_back_to_cpu`.
    """
    if config.device is not None:
        _ask(load, "choose_device", config.device)
    _ask(load, "check_config", config)
    if named and config.device is None:
        _ask(load, "choose_device", None)


def bits_refusal(load: Loader, config: LoadConfig) -> str | None:
    """Return why a backend does not keep the bits of a GGUF file's weights; None if it does.

    It is empty where that is no lack: with other settings, or in backends without such weights.
    """
    if getattr(inspect.getmodule(load), "bits_refusal", None) is None:
        return ""
    refusal: str | None = _ask(load, "bits_refusal", config)
    return refusal


def refuse_drafter(load: Loader, folder: Path, target: Config) -> None:
    """Refuse the drafter of a folder that cannot draft for a target, before it is loaded.

    Raises a CheckpointError, or an UnsupportedModelError if the backend cannot run the drafter.
    """
    if (config := check_drafter(folder, target)) is not None:
        _ask(load, "check_drafter", config)


def drafter_replacer(load: Loader, pair: Backend) -> Callable[[Path], Backend] | None:
    """Return a function that loads other drafters for a pair's loaded target.

    Its results replace the pair, and nothing is checked again. None if the backend loads pairs only
    as a whole. The function raises the errors of a `Loader`.
    """
    replacer: Callable[[Path], Backend] | None = _ask(load, "drafter_replacer", pair)
    return replacer


def memory_limit(load: Loader) -> int | None:
    """Return the bytes that a backend gives to models at most; None if it has no limit."""
    limit: int | None = _ask(load, "memory_limit")
    return limit


def examine_device(name: str, config: LoadConfig) -> DeviceReport:
    """Let a backend report on its device, and check its kernels there, without a model.

    Raises a BackendError if it cannot.
    """
    load = loader(name)
    check_config(load, config)
    report: DeviceReport | None = _ask(load, "examine_device", config)
    if report is None:
        raise BackendError(f"the {name} backend cannot describe its device")
    return report


def fall_back_to_cpu(run: Callable[[LoadConfig], T], config: LoadConfig, *, named: bool) -> T:
    """Call `run` with a configuration and, if it has no usable device, once more with the CPU.

    The fallback is logged as a warning, which Python prints to standard error by default. A
    BackendError is raised instead if the user `named` a backend or a device, or asked for a
    `device_map`.
    """
    try:
        return run(config)
    except BackendError as error:
        if named:
            raise
        if config.device_map is not None:
            reason = str(error).partition(";")[0]
            advice = "device_map needs GPUs; remove device_map"
            raise BackendError(f"{reason}, and {advice}") from error
        # Who installed a framework for CPUs knows; `treeflash doctor` says it.
        reason = "" if isinstance(error, CPUBuildError) else f"{str(error).partition(';')[0]}; "
        logging.getLogger(__name__).warning("%srunning on the CPU", reason)
        return run(replace(config, device="cpu"))


def load_entry_point(name: str, entries: dict[str, EntryPoint]) -> Any:
    """Import a backend; a BackendError if it is unknown, or its framework is missing or broken."""
    if name not in entries:
        raise BackendError(
            f"unknown backend {name!r}; registered are: {', '.join(sorted(entries)) or 'none'}"
        )
    if missing := _missing_packages(name):
        if name == "mlx" and sys.platform == "darwin" and platform.machine() != "arm64":
            raise BackendError(
                "backend 'mlx' needs a native Python on Apple silicon, and this one is built for "
                f"{platform.machine()} (an Intel Mac, or Rosetta); install Python for arm64"
            )
        raise BackendError(
            f"backend {name!r} needs {missing[0]}; pip install '.[{name}]' in a clone of treeflash"
        )
    try:
        return entries[name].load()
    except ImportError as error:
        raise BackendError(
            f"backend {name!r} cannot be imported ({first_line(error)}); update its packages, or "
            "install them again"
        ) from error
