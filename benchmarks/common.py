"""The frame of all benchmarks: command lines, prompts, timing, trees, tables, the machine."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from ctypes.util import find_library
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np

from treeflash.cli import console
from treeflash.cli.options import DECODE_OPTIONS, add_option
from treeflash.config import METHODS, Budget, DecodeConfig, Method
from treeflash.decoding import Request, check
from treeflash.decoding.interfaces import Backend
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash.evaluation.records import MEAN
from treeflash.processors import processor_facts
from treeflash.text.generation import mean
from treeflash.text.prompt import encode, read_rows
from treeflash.text.tokenizer import Tokenizer

T = TypeVar("T")
Row: TypeAlias = dict[str, Any]
"""One line of a table: the columns by name."""
ROOT = Path(__file__).parents[1]
PACKAGES = ("treeflash", "numpy", "torch", "transformers", "mlx", "mlx-lm")


class Parser(console.Parser):
    """A parser whose help is the module's docstring, which has the command, and `--json FILE`."""

    def __init__(self, doc: str | None, *, json: bool = True) -> None:
        super().__init__(None, doc or "", add_help=False)
        self.prog = re.findall(r"python -m benchmarks\.[\w.]+", self.description or "")[0]
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        self.set_defaults(benchmark=self.prog.partition("benchmarks.")[2])
        self.add_argument("-h", "--help", action="help", help="print this help")
        if json:
            help = "write the results to this file"
            self.add_argument("--json", type=output_file, metavar="FILE", help=help)

    def add_prompts(self, *, limit: int, max_tokens: int, nargs: str = "+") -> None:
        """Add the prompt sets, and the defaults of how much of them to decode."""
        help = "prompt sets, one per file"
        self.add_argument("prompts", nargs=nargs, type=Path, metavar="FILE.jsonl", help=help)
        self.add_number("--limit", limit, "prompts per set")
        self.add_number("--max-tokens", max_tokens, "new tokens per prompt")

    def add_number(self, flag: str, default: int, help: str) -> None:
        """Add an option that is a positive integer."""
        help = f"{help} (default: {default})"
        self.add_argument(flag, type=integer, default=default, metavar="N", help=help)

    def add_list(
        self,
        flag: str,
        parse: Callable[[str], T],
        default: Sequence[T],
        help: str,
        metavar: str = "N,...",
    ) -> None:
        """Add an option that is a comma-separated list of values, each of which `parse` reads."""
        self.add_argument(
            flag,
            type=lambda text: [parse(part) for part in text.split(",")],
            default=list(default),
            metavar=metavar,
            help=f"{help} (default: {','.join(map(str, default))})",
        )

    def add_numbers(self, flag: str, default: Sequence[int], help: str, minimum: int = 1) -> None:
        """Add an option that is a comma-separated list of integers."""
        self.add_list(flag, partial(integer, minimum=minimum), default, help)

    def add_names(
        self, flag: str, choices: Collection[str], help: str, default: Sequence[str] = ()
    ) -> None:
        """Add an option that is a comma-separated list of some of the `choices`; all by default."""

        def parse(text: str) -> str:
            if text not in choices:
                known = ", ".join(choices)
                raise argparse.ArgumentTypeError(f"{text!r} is unknown; choose from {known}")
            return text

        self.add_list(flag, parse, default or list(choices), help, "NAME,...")

    def add_budgets(self, default: Sequence[Budget], help: str) -> None:
        """Add `--budgets`: a comma-separated list of numbers of nodes, and `auto`."""
        option = DECODE_OPTIONS["budget"]

        def parse(text: str) -> Budget:
            try:
                assert option.parse is not None
                option.check(value := option.parse(text), option.name)
            except ValueError:
                shown = f"must be {option.accepted_values}, got {text}"
                raise argparse.ArgumentTypeError(shown) from None
            return cast(Budget, value)

        self.add_list("--budgets", parse, default, help, "N|auto,...")

    def add_decode_options(self, *names: str) -> None:
        """Add options of `DecodeConfig` with their defaults."""
        for name in names:
            option = DECODE_OPTIONS[name]
            add_option(self, option, default=option.default)


def command(
    parser: Callable[[], Parser],
) -> Callable[[Callable[[argparse.Namespace], int]], Callable[..., int]]:
    """Make a function of parsed arguments the main function of a benchmark."""

    def decorate(run: Callable[[argparse.Namespace], int]) -> Callable[..., int]:
        def main(argv: Sequence[str] | None = None) -> int:
            return run(parser().parse_args(argv))

        return console.guarded(main)

    return decorate


def output_file(name: str) -> Path:
    """Check a file name for argparse: that it can be written is known before the work begins."""
    path = Path(name)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {name}")
    return path


def integer(text: str, minimum: int = 1) -> int:
    """Parse an integer that is not too small, for argparse."""
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of {minimum} or more")
    return int(text)


def require_testing(extra: str) -> None:
    """Raise a ConfigError unless the extra `testing` is installed; `extra` names the backend's."""
    if missing := [name for name in ("hypothesis", "pytest") if find_spec(name) is None]:
        command = f"pip install '.[{extra},testing]' in a clone of treeflash"
        raise ConfigError(f"this benchmark needs {missing[0]}; {command}")


def alternate_ms(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return each call's median milliseconds: all are made in turn, after a round to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, found in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            found.append(1000 * (time.perf_counter() - started))
    return [median(found[1:]) for found in times]


def read_prompts(tokenizer: Tokenizer, path: Path, limit: int) -> list[list[int]]:
    """Return the token ids of the first prompts of a set."""
    return [encode(tokenizer, row.turns[0]).token_ids for row in read_rows(path)[:limit]]


def first_difference(plain: Sequence[int], tokens: Sequence[int]) -> int:
    """Return the place of the first different token; the shorter length if there is none."""
    pairs = enumerate(zip(plain, tokens, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(plain), len(tokens)))


def random_prompt(vocab_size: int, length: int) -> list[int]:
    """Draw `length` random token ids, the same in every run."""
    return [int(x) for x in np.random.default_rng(length).integers(0, vocab_size, length)]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows as a Markdown table."""
    named = [{key.replace("_", " "): value for key, value in row.items()} for row in rows]
    print(f"{title}\n\n{markdown_table(named)}\n", flush=True)


def markdown_table(rows: Sequence[Row]) -> str:
    """Format rows as a Markdown table, whose columns are the keys of all rows."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[format_cell(row.get(column)) for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_cell(value: Any) -> str:
    """Format a value for a table."""
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def mean_row(rows: Sequence[Row], case: Row, figures: Sequence[str]) -> Row:
    """Average a case over sets: its figures averaged, its prompts summed.

    Args:
        rows: of all cases, one for each set.
        case: the columns that select the rows of one case.
        figures: the columns to average; a figure that a set lacks has no mean.
    """
    selected = [row for row in rows if case.items() <= row.items()]
    means: Row = {}
    for figure in figures:
        values = [row[figure] for row in selected]
        means[figure] = None if None in values else mean(values)
    return {"set": MEAN, **case, **means, "prompts": sum(row["prompts"] for row in selected)}


def supported_methods(backend: Backend) -> list[Method]:
    """List the methods that a pair supports."""
    methods = []
    for method in METHODS:
        with suppress(ConfigError, UnsupportedModelError):
            check(backend, Request(prompt_ids=(0,), config=DecodeConfig(method=method)))
            methods.append(method)
    return methods


def describe(backend: Backend) -> dict[str, str]:
    """Describe the backend, the device and the dtype of a pair."""
    device = "cpu" if backend.device == "cpu" else backend.device_name
    return {"backend": backend.name, "device": device, "dtype": backend.dtype}


def publish(args: argparse.Namespace, about: Row, **tables: Sequence[Row]) -> int:
    """Print tables and write them, with what all of them are about; returns the exit status."""
    facts = [f"{name.replace('_', ' ')} {value}" for name, value in about.items()]
    for name, rows in tables.items():
        show(", ".join([args.benchmark, name, *facts]), rows)
    write_json(args.json, args.benchmark, about | tables)
    return 0


def write_json(path: Path | None, benchmark: str, results: Row) -> None:
    """Write results and a description of the machine; do nothing without a path."""
    if path is not None:
        record = {"benchmark": benchmark, "machine": machine(), **results}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def machine() -> Row:
    """Describe date, hardware and versions; `revision` is git's name of the source."""
    facts = dict(line.split(":", 1) for line in processor_facts() if ":" in line)
    names = [name.strip() for key, name in facts.items() if key.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "revision": _revision(),
        "cpu": [*names, platform.processor() or platform.machine()][0],
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": package_versions(PACKAGES),
    }


def mlx_environment() -> dict[str, str]:
    """Return environment variables for a process that runs MLX.

    On Linux the MLX wheel has a slow matrix product; OpenBLAS replaces it if installed. Do not
    preload OpenBLAS in a process that runs torch: the two can clash.
    """
    openblas = find_library("openblas") if sys.platform == "linux" else None
    return {"LD_PRELOAD": openblas} if openblas else {}


def _revision() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with suppress(OSError):  # there is no git here
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return run.stdout.strip() or None  # the source may come from an archive
    return None


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
