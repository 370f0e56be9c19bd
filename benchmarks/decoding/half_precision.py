"""Texts of drafting compared with plain decoding in half precision, and what exact mode costs.

    python -m benchmarks.decoding.half_precision SETS... --exact --device cpu --texts FILE.jsonl
    python -m benchmarks.decoding.half_precision SETS... --speed --device cpu --dtypes bfloat16
    python -m benchmarks.decoding.half_precision SETS... --exact --speed --device cpu

Without exact mode the logits of a node depend slightly on how many others are computed with it, so
two tokens of nearly equal probability can swap. The first command decodes each prompt with every
dtype, temperature, method, budget and number of sequences at once, and reports the texts that
differ from plain decoding. For the first token that differs of a greedy text it also reports the
gap between the top two logits of plain decoding there, and the spacing of floating-point numbers of
that size. The records of a case are kept in the file `--texts`, and a later run goes on after them.

The second command decodes each prompt with and without exact mode in turn, plainly and with the
budget `auto`, for each number of sequences at once. The third one does both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from operator import ne
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks.common import (
    Parser,
    Row,
    alternate_ms,
    describe,
    first_difference,
    mean_row,
    read_prompts,
    show,
    write_json,
)
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.cli.single_prompt import spacing
from treeflash.config import AUTO, DTYPES, METHODS
from treeflash.language_model import LanguageModel

SEED = 7


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=8, max_tokens=128)
    options.add_budgets([16, 64, AUTO], "budgets")
    options.add_names("--methods", METHODS, "methods", ["dflash", "ddtree", "treeflash"])
    options.add_names("--dtypes", DTYPES, "number formats", ["bfloat16", "float16"])
    options.add_numbers("--temperatures", [0, 1], "temperatures", minimum=0)
    options.add_numbers("--parallel", [1, 8], "sequences at once")
    options.add_argument("--texts", type=Path, metavar="FILE.jsonl", help="keep records here")
    options.add_argument(
        "--speed",
        action="store_true",
        help="measure what exact mode costs; texts are compared too with --exact",
    )
    options.add_number("--repeats", 2, "measured rounds of --speed")
    add_model_options(options)
    return options


def compare_texts(args: argparse.Namespace, model: LanguageModel) -> list[Row]:
    """Return one row per set, temperature, method, budget and number of sequences at once."""
    rows = []
    shared = {"dtype": model.backend.dtype, "exact": model.backend.inexact is None}
    for path, temperature in product(args.prompts, args.temperatures):
        prompts = read_prompts(model.tokenizer, path, args.limit)
        case = {**shared, "set": path.stem, "temperature": temperature, "prompts": len(prompts)}
        case["tokens"] = args.max_tokens
        options = {"max_tokens": args.max_tokens, "temperature": temperature, "seed": SEED}
        plain = _texts(model, args.texts, {**case, "method": "ar"}, prompts, options, 1)
        cases = list(product(args.methods, args.budgets, args.parallel))
        for method, budget, parallel in track(cases, f"{path.stem}, temperature {temperature}"):
            settings = {"method": method, "budget": budget, "parallel": parallel}
            drafted = _texts(model, args.texts, case | settings, prompts, options, parallel)
            row = {**case, **settings, "differ": sum(map(ne, plain, drafted))}
            if temperature == 0:
                row |= first_margin(model, prompts, plain, drafted)
            rows.append(row)
    return rows


def _texts(
    model: LanguageModel,
    file: Path | None,
    case: Row,
    prompts: list[list[int]],
    options: dict[str, Any],
    parallel: int,
) -> list[list[int]]:
    """Return the tokens of each prompt's text, from the file of records if it has the case."""
    lines = file.read_text("utf-8").splitlines() if file and file.exists() else []
    for record in map(json.loads, lines):
        if record["case"] == case:
            return list(record["texts"])
    settings = {key: case[key] for key in ("method", "budget") if key in case}
    texts: list[list[int]] = [[] for _ in prompts]
    for number, text in model.generate_many(prompts, parallel=parallel, **options, **settings):
        texts[number] = text.token_ids
    if file is not None:
        with file.open("a", encoding="utf-8") as output:
            output.write(json.dumps({"case": case, "texts": texts}) + "\n")
    return texts


def first_margin(
    model: LanguageModel,
    prompts: list[list[int]],
    plain: list[list[int]],
    drafted: list[list[int]],
) -> Row:
    """Return plain decoding's largest margin between two logits at the first token that differs."""
    found: Row = {"margin": None, "spacing": None}
    for prompt, expected, actual in zip(prompts, plain, drafted, strict=True):
        if expected == actual:
            continue
        known = expected[: first_difference(expected, actual)]
        logits = model.stream(prompt, method="ar").next_logits(known)
        second, best = np.sort(logits)[-2:].tolist()
        if found["margin"] is None or best - second > found["margin"]:
            found = {"margin": best - second, "spacing": spacing(best, model.backend.dtype)}
    return found


def compare_speeds(args: argparse.Namespace, dtype: str) -> Iterator[Row]:
    """Compare the speed without and with exact mode, for each set, method and batch.

    They take turns with the same prompts, after a round that warms up and measures the costs of
    forward passes. Times are medians, because other programs disturb some rounds.
    """
    models = [
        load_model(argparse.Namespace(**{**vars(args), "dtype": dtype, "exact": exact}))
        for exact in (False, True)
    ]
    methods = ("ar", models[0].best_method)
    for path in args.prompts:
        prompts = read_prompts(models[0].tokenizer, path, args.limit)
        for method, parallel in product(methods, args.parallel):
            tokens, ms = np.zeros(2), np.zeros(2)
            options = {"method": method, "max_tokens": args.max_tokens, "parallel": parallel}
            starts = range(0, len(prompts), parallel)
            for start in track(starts, f"{path.stem}, {method}, {parallel}"):
                part = prompts[start : start + parallel]
                counts = [0, 0]
                calls = [
                    partial(_count_tokens, model, part, options, counts, i)
                    for i, model in enumerate(models)
                ]
                ms += alternate_ms(calls, args.repeats)
                tokens += counts
            plain, exact = (1000 * tokens / ms).tolist()
            yield {
                **{"dtype": dtype, "set": path.stem, "method": method, "parallel": parallel},
                **{"prompts": len(prompts), "tokens_per_s": plain, "exact_tokens_per_s": exact},
                "ratio": exact / plain,
            }


def _count_tokens(
    model: LanguageModel,
    prompts: list[list[int]],
    options: dict[str, Any],
    counts: list[int],
    place: int,
) -> None:
    """Decode prompts, and write the number of their tokens to a place of `counts`."""
    texts = model.generate_many(prompts, **options)
    counts[place] = sum(len(text.token_ids) for _, text in texts)


def summary(rows: Sequence[Row]) -> str:
    """Return one line for all texts."""
    texts, differ = (sum(row[key] for row in rows) for key in ("prompts", "differ"))
    if not differ:
        return f"all {texts} texts are equal to plain decoding"
    return f"{differ} of {texts} texts differ from plain decoding"


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    texts: list[Row] = []
    speeds: list[Row] = []
    pair: dict[str, str] = {}
    if args.exact or not args.speed:
        for dtype in args.dtypes:
            model = load_model(argparse.Namespace(**{**vars(args), "dtype": dtype}))
            pair = describe(model.backend)
            texts += compare_texts(args, model)
        show(f"half precision, {', '.join(pair.values())}", texts)
        print(summary(texts), flush=True)
    if args.speed:
        for dtype in args.dtypes:
            found = list(compare_speeds(args, dtype))
            for method, parallel in dict.fromkeys((x["method"], x["parallel"]) for x in found):
                case = {"dtype": dtype, "method": method, "parallel": parallel}
                means = mean_row(found, case, ["tokens_per_s", "exact_tokens_per_s", "ratio"])
                found.append({key: means[key] for key in found[0]})
            speeds += found
        show("what exact mode costs", speeds)
    write_json(args.json, "half_precision", pair | {"rows": texts, "speeds": speeds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
