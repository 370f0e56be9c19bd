"""Shared by the benchmarks: options, medians, random trees, tables, and the machine."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from ctypes.util import find_library
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import numpy as np
from rich.console import Console
from rich.table import Table

from treeflash.decoding.statistics import mean
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, build_tree

DEPTHS, CHILDREN = 15, 32  # of a random tree
PACKAGES = ("treeflash", "numpy", "torch", "transformers", "mlx", "mlx-lm")


class Parser(argparse.ArgumentParser):
    """An argument parser with `--json FILE` whose errors are one line."""

    def __init__(self, description: str | None) -> None:
        """Start with `--json`.

        Args:
            description: for `--help`.
        """
        super().__init__(description=description)
        self.add_argument(
            "--json",
            type=output_file,
            metavar="FILE",
            help="write the results to this file as JSON",
        )

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def output_file(name: str) -> Path:
    """A file name for argparse; checks before the work that the file can be written."""
    path = Path(name)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name} cannot be written")
    return path


def at_least_one(text: str) -> int:
    """A positive integer, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not an integer of 1 or more")
    return int(text)


def numbers(text: str) -> list[int]:
    """Comma-separated integers, for argparse."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is not a comma-separated list of integers"
        ) from None


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """The median duration of `repeats` calls, in milliseconds, after a tenth as many to warm up."""
    times = []
    for _ in range(repeats + repeats // 10 + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * median(times[-repeats:])


def random_tree(vocab_size: int, nodes: int) -> DraftTree:
    """A tree built from random marginals."""
    rng = np.random.default_rng(nodes)
    tokens = rng.integers(0, vocab_size, (DEPTHS, CHILDREN)).astype(np.int32)
    log_probs = -np.sort(rng.exponential(2, (DEPTHS, CHILDREN))).astype(np.float32)
    return build_tree(TransitionTable.from_marginals(tokens, log_probs), 0, nodes)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table; the keys of the first row are the columns."""
    table = Table(title=title, title_justify="left")
    for column, value in rows[0].items():
        table.add_column(column, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def mean_row(rows: list[dict], case: dict[str, Any], figures: tuple[str, ...]) -> dict[str, Any]:
    """The mean row of a case: its figures averaged over sets, its prompts summed."""
    same = [row for row in rows if case.items() <= row.items()]
    means = {name: mean(row[name] for row in same) for name in figures}
    return {"set": "mean", **case, **means, "prompts": sum(row["prompts"] for row in same)}


def write_json(path: Path | None, benchmark: str, results: dict[str, Any]) -> None:
    """Write results and a description of the machine; do nothing without a path."""
    if path is not None:
        record = {"benchmark": benchmark, "machine": machine(), **results}
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Date, hardware and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def fast_mlx() -> dict[str, str]:
    """Environment variables for a process that runs MLX.

    On Linux the MLX wheel has a slow matrix product; OpenBLAS replaces it if installed. Do not
    preload OpenBLAS in a process that runs torch: the two can clash.
    """
    openblas = find_library("openblas") if sys.platform == "linux" else None
    return {"LD_PRELOAD": openblas} if openblas else {}


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
