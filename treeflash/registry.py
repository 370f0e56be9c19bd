"""Backends by name: entry points, imported when they are used."""

from __future__ import annotations

import inspect
import logging
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, TypeVar, cast

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Loader
from treeflash.errors import BackendError

T = TypeVar("T")

GROUP = "treeflash.backends"
_FRAMEWORKS = {"cuda": ("torch", "transformers"), "mlx": ("mlx", "mlx_lm")}


def available(group: str = GROUP) -> dict[str, EntryPoint]:
    """The entry points of a group by name, whether or not their frameworks are installed.

    Raises:
        BackendError: two packages register the same name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        if entry.name in found and found[entry.name].value != entry.value:
            raise BackendError(
                f"backend {entry.name!r} is registered twice, by {found[entry.name].value} and "
                f"{entry.value}; uninstall one of the two packages"
            )
        found[entry.name] = entry
    return found


def installed(name: str) -> bool:
    """Whether the framework of a backend is installed."""
    return not _missing(name)


def _missing(name: str) -> list[str]:
    return [package for package in _FRAMEWORKS.get(name, ()) if find_spec(package) is None]


def best() -> str:
    """The default backend: MLX on Apple Silicon, else the first installed of torch, MLX, NumPy."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    order = ("mlx", "cuda") if apple else ("cuda", "mlx")
    return next((name for name in order if installed(name)), "reference")


def loader(name: str) -> Loader:
    """The entry point of a backend.

    Raises:
        BackendError: no backend has that name, or its framework is not installed.
    """
    return cast(Loader, load_entry_point(name, available()))


def check_device(load: Loader, device: str) -> None:
    """Have a backend reject a device before models are fetched, if it can: see `Loader`.

    Raises:
        BackendError: there is no such device.
    """
    choose = getattr(inspect.getmodule(load), "choose_device", None)
    if choose is not None:
        choose(device)


def on_some_device(run: Callable[[LoadConfig], T], config: LoadConfig, *, named: bool) -> T:
    """Run with a configuration; on the CPU if there is no other device and the user named none.

    Running on the CPU is logged as a warning, which Python prints to standard error by default.

    Raises:
        BackendError: there is no such device, and the user named it.
    """
    try:
        return run(config)
    except BackendError as error:
        if named:
            raise
        logging.getLogger(__name__).warning(
            "%s; running on the CPU in %s",
            str(error).partition(";")[0],
            config.dtype or "float32, slower than on a GPU",
        )
        return run(replace(config, device="cpu"))


def load_entry_point(name: str, entries: dict[str, EntryPoint]) -> Any:
    """Import the entry point of a backend.

    Raises:
        BackendError: no entry point has that name, or its framework is not installed.
    """
    if name not in entries:
        raise BackendError(
            f"unknown backend {name!r}; registered are: {', '.join(sorted(entries)) or 'none'}"
        )
    if missing := _missing(name):
        raise BackendError(f"backend {name!r} needs {missing[0]}; pip install 'treeflash[{name}]'")
    return entries[name].load()
