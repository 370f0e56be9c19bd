"""Block efficiency and speed of the decoding methods, side by side in one run.

    python -m benchmarks.decoding.methods gsm8k.jsonl --budgets 16,64,auto [--json FILE]

Every prompt is decoded by every method in turn before the next prompt, so that a disturbance of the
machine affects all of them. All methods are forced to write the text of plain decoding (`ar`), even
if rounding would make them diverge. Ratios compare the total time of a set's texts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

from benchmarks.common import Parser, at_least_one, mean_row, show, write_json
from benchmarks.decoding.forced_text import ForcedText
from treeflash.cli.exit_status import guarded
from treeflash.cli.options import add_model_options, budget, load_model
from treeflash.config import AUTO, METHODS, Budget, Method
from treeflash.decoding.statistics import mean
from treeflash.errors import ConfigError
from treeflash.evaluation.bootstrap import interval, resamples
from treeflash.language_model import LanguageModel
from treeflash.text.generation import Generation
from treeflash.text.prompt_file import read_rows


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("prompts", nargs="+", type=Path, metavar="FILE.jsonl", help="prompt sets")
    options.add_argument(
        "--limit", type=at_least_one, default=8, help="prompts per set (default: 8)"
    )
    options.add_argument(
        "--max-tokens", type=at_least_one, default=128, help="new tokens per prompt (default: 128)"
    )
    options.add_argument(
        "--methods", default=",".join(METHODS), help="comma-separated (default: all)"
    )
    options.add_argument(
        "--budgets", default="16,64,auto", help="of tree methods (default: 16,64,auto)"
    )
    options.add_argument("--temperature", type=float, default=0.0)
    options.add_argument("--seed", type=int, default=0)
    add_model_options(options)
    return options


class Case(NamedTuple):
    """A method at a budget."""

    method: Method
    budget: Budget

    @property
    def name(self) -> dict:
        """Its columns in the results."""
        return {"method": self.method, "budget": 1 if self.method == "ar" else self.budget}


def cases(methods: str, budgets: str) -> list[Case]:
    """Every method at every budget, plain decoding first; chains only at the largest budget."""
    names = ["ar", *(name for name in methods.split(",") if name != "ar")]
    try:
        sizes = [budget(size) for size in budgets.split(",")]
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--budgets: {error}") from None
    largest = max((size for size in sizes if size != AUTO), default=AUTO)
    return [
        Case(name, size)
        for name in names
        for size in (sizes if name in ("ddtree", "treeflash") else [largest])
    ]


Runs = dict[Case, list[Generation]]
"""Generations of the same prompts in the same order, by case."""


def row(name: str, case: Case, runs: list[Generation], plain: list[Generation]) -> dict:
    """One line of the table."""
    lengths = [length for run in runs for length in run.accepted_lengths]
    decode_s = sum(run.decode_s for run in runs)
    return {"set": name, **case.name} | {
        "block_efficiency": mean(lengths),
        "tokens_per_s": sum(lengths) / decode_s,
        "ratio_to_ar": sum(run.decode_s for run in plain) / decode_s,
        "prompts": len(runs),
    }


def auto_rows(name: str, runs: Runs) -> list[dict]:
    """The speed of `auto` relative to the fastest fixed budget of the same runs."""
    seconds = {case: np.array([run.decode_s for run in of]) for case, of in runs.items()}
    rows = []
    for auto in [case for case in seconds if case.method != "ar" and case.budget == AUTO]:
        fixed = [case for case in seconds if case.method == auto.method and case != auto]
        if not fixed:
            continue
        best = min(fixed, key=lambda case: seconds[case].sum())
        drawn = resamples(len(seconds[auto]), np.random.default_rng(0))
        ratios = seconds[best][drawn].sum(1) / seconds[auto][drawn].sum(1)
        low, high = interval(ratios)
        rows.append(
            {"set": name, "method": auto.method, "best": best.budget}
            | {"auto_to_best": float(ratios[0]), "low": low, "high": high}
        )
    return rows


def measure(model: LanguageModel, args, chosen: list[Case]) -> tuple[list[dict], list[dict]]:
    """The rows of all sets and their mean; and those that compare `auto`, per set and overall."""

    def run(prompt: str, case: Case) -> Generation:
        return model.generate(
            prompt,
            **case._asdict(),
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            seed=args.seed,
        )

    forced = ForcedText(model.backend)
    model = replace(model, backend=forced)
    plain_case, *others = chosen
    rows, auto = [], []
    all_runs: Runs = {case: [] for case in chosen}
    for path in args.prompts:
        runs: Runs = {case: [] for case in chosen}
        for prompt in track(read_rows(path)[: args.limit], path.stem):
            forced.text = ()
            plain = run(prompt.turns[0], plain_case)
            # A text of one token has no iteration, hence no speed.
            if not plain.accepted_lengths:
                continue
            runs[plain_case].append(plain)
            forced.text = plain.token_ids
            for case in others:
                runs[case].append(run(prompt.turns[0], case))
        for case in chosen:
            all_runs[case] += runs[case]
        rows += [row(path.stem, case, runs[case], runs[plain_case]) for case in chosen]
        auto += auto_rows(path.stem, runs)
    figures = ("block_efficiency", "tokens_per_s", "ratio_to_ar")
    rows += [mean_row(rows, case.name, figures) for case in chosen]
    return rows, auto + auto_rows("all", all_runs)


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    chosen = cases(args.methods, args.budgets)
    model = load_model(args)
    rows, auto = measure(model, args, chosen)
    backend = model.backend
    where = {"backend": backend.name, "device": backend.device, "dtype": backend.dtype}
    show(f"methods, {' '.join(where.values())}, {args.max_tokens} tokens per prompt", rows)
    if auto:
        show("auto relative to the best fixed budget", auto)
    write_json(args.json, "methods", where | {"rows": rows, "auto": auto})
    return 0


if __name__ == "__main__":
    sys.exit(main())
