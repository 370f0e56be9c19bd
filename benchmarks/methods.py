"""Block efficiency and speed of the decoding methods, side by side in one run.

Every prompt is decoded by every method in turn before the next prompt, so that what disturbs the
machine disturbs all of them. Ratios are to plain decoding (`ar`) of the same prompt, and all write
the text that it writes, also where rounding would have them leave it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from common import Parser, at_least_one, mean_row, show, write_json
from one_text import OneText
from rich.progress import track

from treeflash.command import add_model_options, budget, guarded, load_model
from treeflash.config import AUTO, METHODS, Budget, Method
from treeflash.errors import ConfigError
from treeflash.generation import Generation
from treeflash.language_model import LanguageModel
from treeflash.prompt_file import read_rows
from treeflash.stats import mean


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("prompts", nargs="+", type=Path, metavar="FILE.jsonl", help="one a set")
    options.add_argument("--limit", type=at_least_one, default=8, help="prompts a set (8)")
    options.add_argument("--max-tokens", type=at_least_one, default=128, help="a prompt (128)")
    options.add_argument("--methods", default=",".join(METHODS), help="separated by commas")
    options.add_argument("--budgets", default="16,64,auto", help="of tree methods (16,64,auto)")
    options.add_argument("--temperature", type=float, default=0.0)
    options.add_argument("--seed", type=int, default=0)
    add_model_options(options)
    return options


class Case(NamedTuple):
    """A way to decode."""

    method: Method
    budget: Budget

    @property
    def name(self) -> dict:
        """As the results give it."""
        return {"method": self.method, "budget": 1 if self.method == "ar" else self.budget}


def cases(methods: str, budgets: str) -> list[Case]:
    """Every way to decode, plain decoding first; chains have one budget, the largest."""
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


def row(name: str, case: Case, runs: list[Generation], plain: list[Generation]) -> dict:
    """One line of the table."""
    ratios = [run.tokens_per_s / base.tokens_per_s for run, base in zip(runs, plain, strict=True)]
    lengths = [length for run in runs for length in run.accepted_lengths]
    return {"set": name, **case.name} | {
        "block_efficiency": mean(lengths),
        "tokens_per_s": sum(lengths) / sum(run.decode_s for run in runs),
        "ratio_to_ar": median(ratios),
        "prompts": len(runs),
    }


def measure(model: LanguageModel, args, chosen: list[Case]) -> list[dict]:
    """The rows of all sets, and of their mean."""

    def run(prompt: str, case: Case) -> Generation:
        return model.generate(
            prompt,
            **case._asdict(),
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            seed=args.seed,
        )

    one_text = OneText(model.backend)
    model = replace(model, backend=one_text)
    plain_case, *others = chosen
    rows = []
    for path in args.prompts:
        runs: dict[Case, list[Generation]] = {case: [] for case in chosen}
        for prompt in track(read_rows(path)[: args.limit], path.stem):
            one_text.text = ()
            runs[plain_case].append(run(prompt.turns[0], plain_case))
            one_text.text = runs[plain_case][-1].token_ids
            for case in others:
                runs[case].append(run(prompt.turns[0], case))
        # A text of one token has no iteration, and so no speed to compare.
        kept = [i for i, base in enumerate(runs[plain_case]) if base.accepted_lengths]
        plain = [runs[plain_case][i] for i in kept]
        rows += [row(path.stem, case, [runs[case][i] for i in kept], plain) for case in chosen]
    figures = ("block_efficiency", "tokens_per_s", "ratio_to_ar")
    return rows + [mean_row(rows, case.name, figures) for case in chosen]


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    chosen = cases(args.methods, args.budgets)
    model = load_model(args)
    rows = measure(model, args, chosen)
    backend = model.backend
    where = {"backend": backend.name, "device": backend.device, "dtype": backend.dtype}
    show(f"methods, {' '.join(where.values())}, {args.max_tokens} tokens a prompt", rows)
    write_json(args.json, "methods", where | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
