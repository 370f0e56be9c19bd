"""Texts of drafting compared with plain decoding in half precision.

    python -m benchmarks.decoding.half_precision SETS... --exact --device cpu --texts FILE.jsonl

Without exact mode the logits of a node depend slightly on how many others are computed with it, so
two tokens of nearly equal probability can swap. The command decodes each prompt with every
dtype, temperature, method, budget and number of sequences at once, and counts the texts that differ
from plain decoding; `treeflash generate --compare` tells whether rounding explains a difference.
The records of a case are kept in the file `--texts`, and a later run goes on after them.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from itertools import product
from operator import ne
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.common import Parser, Row, command, describe, publish, read_prompts
from treeflash.cli.options import add_model_options, load_model
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
    add_model_options(options)
    return options


def compare_texts(args: Namespace, model: LanguageModel) -> list[Row]:
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
            rows.append({**case, **settings, "differ": sum(map(ne, plain, drafted))})
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


@command(parser)
def main(args: Namespace) -> int:
    """Measure, print, write."""
    texts: list[Row] = []
    for dtype in args.dtypes:
        model = load_model(args, dtype=dtype)
        texts += compare_texts(args, model)
    publish(args, describe(model.backend), rows=texts)
    count, differ = (sum(row[name] for row in texts) for name in ("prompts", "differ"))
    print(f"{differ} of {count} texts differ from plain decoding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
