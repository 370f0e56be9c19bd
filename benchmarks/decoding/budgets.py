"""Speed of the budget `auto` relative to fixed tree sizes, by prompt set and dtype.

    python -m benchmarks.decoding.budgets gsm8k.jsonl mt_bench.jsonl --limit 4 [--json FILE]

Every prompt is decoded plainly, with each size, with `auto` and with copies alone in turn, in
several rounds; the median time of a prompt counts. What `auto` learns it keeps between prompts, as
a server does. A column has tokens per second, summed over the prompts of a set.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.common import Parser, Row, describe, show, write_json
from benchmarks.decoding.methods import Case, Head, measure
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import AUTO, DTYPES, DecodeConfig
from treeflash.decoding.interfaces import warm_up
from treeflash.evaluation.records import MEAN

HEAD = Head(DecodeConfig.head_vocab, DecodeConfig.head_rows)


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=8, max_tokens=96)
    options.add_number("--rounds", 3, "times that a prompt is decoded; the median time counts")
    options.add_budgets([8, 16, 32, 64], "fixed sizes")
    options.add_names("--dtypes", DTYPES, "dtypes", ["float32", "bfloat16"])
    options.add_decode_options("temperature", "seed")
    add_model_options(options)
    return options


def rows_of(dtype: str, measured: Sequence[Row]) -> list[Row]:
    """Return a row for each prompt set, with a column for each way of decoding."""
    rows: dict[str, Row] = {}
    for found in measured:
        row = rows.setdefault(found["set"], {"dtype": dtype, "set": found["set"]})
        name = {"ar": "plain", "treeflash": str(found["budget"]), "suffix": "copies alone"}
        row[name[found["method"]]] = found["tokens_per_s"]
    for row in rows.values():
        fixed = [speed for name, speed in row.items() if name.isdecimal()]
        row["auto to best"] = row[AUTO] / max(fixed)
        row["copies to plain"] = row["copies alone"] / row["plain"]
    return [row for row in rows.values() if row["set"] != MEAN]


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    cases = [
        Case("ar", AUTO, None, None),
        *(Case("treeflash", size, HEAD, True) for size in (*args.budgets, AUTO)),
        Case("suffix", AUTO, None, None),
    ]
    rows: list[Row] = []
    for dtype in args.dtypes:
        args.dtype = dtype
        model = load_model(args)
        warm_up(model.backend, 1)
        rows += rows_of(dtype, measure(model, args, cases)["rows"])
        pair = describe(model.backend)
    show(f"tokens per second, {args.max_tokens} tokens per prompt", rows)
    write_json(args.json, "budgets", pair | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
