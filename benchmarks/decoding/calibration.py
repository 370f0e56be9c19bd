"""Block efficiency of draft trees with and without calibration, on the same prompts.

    python -m benchmarks.decoding.calibration gsm8k.jsonl mbpp.jsonl --parallel 8 [--json FILE]

`ratio` is the block efficiency with calibration divided by the one without, whose trees are as
published. Its 95 % bootstrap interval is over prompts, paired: both decode the same resampled
prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Parser, Row, describe, evaluate, show, write_json
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import METHODS
from treeflash.evaluation.records import MEAN, efficiencies_by_case, interval, resamples
from treeflash.evaluation.run import Case, Sample, list_cases


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=8, max_tokens=64)
    options.add_names("--methods", METHODS, "methods", ["ddtree", "treeflash"])
    options.add_numbers("--budgets", [16, 64], "nodes of the trees")
    options.add_number("--parallel", 1, "sequences at once")
    options.add_decode_options("temperature")
    add_model_options(options)
    return options


def compare(
    samples: Sequence[dict[str, list[Sample]]], cases: Sequence[Case], rng: np.random.Generator
) -> list[Row]:
    """Compute the block efficiencies by set and case, without and with calibration."""
    efficiencies: dict[str, dict[Case, list[NDArray[np.float64]]]] = {}
    for name in samples[0]:
        drawn = resamples(len(samples[0][name]), rng)
        both = [efficiencies_by_case(own[name], drawn) for own in samples]
        efficiencies[name] = {case: [own[case] for own in both] for case in cases}
    efficiencies[MEAN] = {
        case: list(np.mean([by_case[case] for by_case in efficiencies.values()], 0))
        for case in cases
    }
    rows = []
    for name, by_case in efficiencies.items():
        for case, (off, on) in by_case.items():
            low, high = interval(on / off)
            row = {"set": name, **case._asdict(), "off": float(off[0]), "on": float(on[0])}
            rows.append({**row, "ratio": float(on[0] / off[0]), "low": low, "high": high})
    return rows


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    model = load_model(args)
    cases = list_cases(args.methods, args.budgets)
    samples = [evaluate(model, args, cases, calibration=switch) for switch in (False, True)]
    rows = compare(samples, cases, np.random.default_rng(0))
    pair = describe(model.backend)
    show(f"calibration, {', '.join(pair.values())}", rows)
    write_json(args.json, "calibration", pair | {"calibration": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
