r"""Speed of the budget `auto` relative to fixed tree sizes, by prompt set.

    python -m benchmarks.decoding.budgets gsm8k.jsonl mt_bench.jsonl --dtype bfloat16 --bits 16 \
        [--json FILE]

Every prompt is decoded plainly, with each size, with `auto` and with copies alone in turn, in
several rounds; the median time of a prompt counts. What `auto` learns it keeps between the prompts
of a set. A column has tokens per second, summed over the prompts. Sets whose rows the file already
has are not measured again, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Parser, Row, command, describe, show, write_json
from benchmarks.decoding.methods import Case, measure
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import AUTO
from treeflash.decoding.interfaces import warm_up
from treeflash.evaluation.records import MEAN


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=2, max_tokens=48)
    options.add_number("--rounds", 3, "times that a prompt is decoded; the median time counts")
    options.add_budgets([8, 16, 32, 64], "fixed sizes")
    options.add_decode_options("temperature", "seed")
    add_model_options(options)
    return options


def rows_of(measured: Sequence[Row]) -> list[Row]:
    """Return a row for each prompt set, with a column for each way of decoding."""
    rows: dict[str, Row] = {}
    for found in measured:
        row = rows.setdefault(found["set"], {"set": found["set"]})
        name = {"ar": "plain", "treeflash": str(found["budget"]), "suffix": "copies alone"}
        row[name[found["method"]]] = found["tokens_per_s"]
    for row in rows.values():
        fixed = [speed for name, speed in row.items() if name.isdecimal()]
        row["auto to best"] = row[AUTO] / max(fixed)
        row["copies to plain"] = row["copies alone"] / row["plain"]
    return [row for row in rows.values() if row["set"] != MEAN]


def kept_rows(file: Path | None, settings: dict[str, str]) -> list[Row]:
    """Return the rows that a run with the same settings left in its file."""
    if file is None or not file.exists():
        return []
    results = json.loads(file.read_text(encoding="utf-8"))
    return list(results["rows"]) if results["settings"] == settings else []


@command(parser)
def main(args: Namespace) -> int:
    """Measure, print, write."""
    cases = [
        Case("ar", AUTO, None),
        *(Case("treeflash", size, True) for size in (*args.budgets, AUTO)),
        Case("suffix", AUTO, None),
    ]
    model = load_model(args)
    warm_up(model.backend, 1)
    pair, options = describe(model.backend), vars(args).copy()
    sets, file, name = (options.pop(x) for x in ("prompts", "json", "benchmark"))
    settings = {key: str(value) for key, value in options.items()}
    rows = kept_rows(file, settings)
    for path in sets:
        if path.stem not in [row["set"] for row in rows]:
            rows += rows_of(measure(model, Namespace(**options, prompts=[path]), cases))
            write_json(file, name, pair | {"settings": settings, "rows": rows})
    show(
        f"tokens per second, {', '.join(pair.values())}, {args.max_tokens} tokens per prompt", rows
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
