"""Block efficiency and speed of the decoding methods, side by side in one run.

Every prompt is decoded by every method in turn before the next prompt, so that what disturbs the
machine disturbs all of them. Ratios are to plain decoding (`ar`) of the same prompt.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

from common import Parser, at_least_one, show, write_json
from rich.progress import track

from treeflash.command import add_model_options, budget, guarded, head_vocab, load_model
from treeflash.config import AUTO, METHODS, Budget
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
    options.add_argument(
        "--head-vocab", type=head_vocab, metavar="full|N", help="tokens that the AR head scores"
    )
    options.add_argument("--temperature", type=float, default=0.0)
    options.add_argument("--seed", type=int, default=0)
    add_model_options(options)
    return options


def cases(methods: str, budgets: str) -> list[tuple[str, Budget]]:
    """Pairs of method and budget, plain decoding first; chains have one budget, the largest."""
    names = ["ar", *(name for name in methods.split(",") if name != "ar")]
    try:
        sizes = [budget(size) for size in budgets.split(",")]
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--budgets: {error}") from None
    largest = max((size for size in sizes if size != AUTO), default=AUTO)
    trees = ("ddtree", "treeflash")
    return [(name, size) for name in names for size in (sizes if name in trees else [largest])]


def row(
    name: str, case: tuple[str, Budget], runs: list[Generation], plain: list[Generation]
) -> dict:
    """One line of the table."""
    ratios = [run.tokens_per_s / base.tokens_per_s for run, base in zip(runs, plain, strict=True)]
    lengths = [length for run in runs for length in run.accepted_lengths]
    return {
        "set": name,
        "method": case[0],
        "budget": 1 if case[0] == "ar" else case[1],
        "block_efficiency": mean(lengths),
        "tokens_per_s": sum(lengths) / sum(run.decode_s for run in runs),
        "ratio_to_ar": median(ratios),
        "equal": sum(
            run.token_ids == base.token_ids for run, base in zip(runs, plain, strict=True)
        ),
        "prompts": len(runs),
    }


def measure(model: LanguageModel, args, chosen: list[tuple[str, Budget]]) -> list[dict]:
    """The rows of all sets, and of their mean."""

    def run(prompt: str, method: str, budget: Budget) -> Generation:
        return model.generate(
            prompt,
            method=method,
            budget=budget,
            head_vocab=args.head_vocab,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            seed=args.seed,
        )

    rows = []
    for path in args.prompts:
        runs: dict[tuple[str, Budget], list[Generation]] = {case: [] for case in chosen}
        for prompt in track(read_rows(path)[: args.limit], path.stem):
            for case in chosen:
                runs[case].append(run(prompt.turns[0], *case))
        # A text of one token has no iteration, and so no speed to compare.
        kept = [i for i, base in enumerate(runs["ar", chosen[0][1]]) if base.accepted_lengths]
        plain = [runs["ar", chosen[0][1]][i] for i in kept]
        rows += [row(path.stem, case, [runs[case][i] for i in kept], plain) for case in chosen]
    return rows + [mean_row(rows, case) for case in chosen]


def mean_row(rows: list[dict], case: tuple[str, Budget]) -> dict:
    """The mean over sets."""
    budget = 1 if case[0] == "ar" else case[1]
    same = [r for r in rows if (r["method"], r["budget"]) == (case[0], budget)]
    figures = ("block_efficiency", "tokens_per_s", "ratio_to_ar")
    counts = ("equal", "prompts")
    return (
        {"set": "mean", "method": case[0], "budget": budget}
        | {name: mean(r[name] for r in same) for name in figures}
        | {name: sum(r[name] for r in same) for name in counts}
    )


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
