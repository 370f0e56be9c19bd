"""Do conditional trees pay? Best drafts on the spine and after a sibling, and trees against chains.

    python -m benchmarks.decoding.branches gsm8k.jsonl mbpp.jsonl --parallel 8 [--json FILE]

- `best drafts`: how often the most probable draft of a depth is the target's token, by method and
  depth: if each token before it was the best draft (`spine`), and if one was not (`sibling`).
- `ratios`: the block efficiency of a method over the baseline's, with equally many rows in each
  forward pass of the target, and its 95 % bootstrap interval over prompts, which are paired.

`python -m benchmarks.decoding.iteration --parts break_even` has the block efficiency from which on
drafting pays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.common import Parser, Row, describe, evaluate, show, write_json
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.errors import ConfigError
from treeflash.evaluation.records import MEAN, compute_records
from treeflash.evaluation.run import list_cases

METHODS = ("dflash", "ddtree", "treeflash-chain", "treeflash")


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=6, max_tokens=64)
    options.add_number("--parallel", 1, "sequences at once")
    options.add_decode_options("temperature")
    add_model_options(options)
    return options


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    model = load_model(args)
    drafter = model.backend.drafter_config
    if drafter is None or model.backend.head is None:
        raise ConfigError("the benchmark compares drafts with and without an AR head; pass both")
    rows_per_pass = drafter.depths + 1  # rows of the longest chain
    records = compute_records(evaluate(model, args, list_cases(METHODS, [rows_per_pass])), 0)
    results: dict[str, list[Row]] = {
        "best drafts": records["branches"],
        "ratios": [row for row in records["ratios"] if row["set"] == MEAN],
        "block efficiencies": [row for row in records["rows"] if row["set"] == MEAN],
    }
    pair = describe(model.backend)
    for name, rows in results.items():
        show(f"{name}, {', '.join(pair.values())}", rows)
    write_json(args.json, "branches", pair | results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
