"""Throughput of many sequences at once, beside the batched generation of other packages.

    python -m benchmarks.throughput gsm8k.jsonl mt_bench.jsonl --backend cuda [--json FILE]

For every number of sequences, the prompts of a set are cut into groups of that size, and a group is
handed over at once. The systems run as in `benchmarks.peers`: each in its own process, with the
same weights, device, dtype and threads, and they answer a group in turn before the next group. A
group ends with its last sequence. The first group of each number is answered once before anything
is measured. Decoding is greedy, from the same token ids to the same stop tokens and limit; the
budget is `auto`.

Tokens per second count all new tokens of a group and all its time, the prefill included. With
`--backend cuda` the other package is transformers with its padded `generate`, with `--backend mlx`
mlx-lm with its `BatchGenerator`. Systems that cannot run are listed with the reason.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from operator import eq
from statistics import median
from typing import NamedTuple

from rich.progress import track

from benchmarks.common import Parser, Row, mean_row, show, write_json
from benchmarks.peers.comparison import Comparison
from benchmarks.peers.pair import add_pair_options, running, setup_of
from benchmarks.peers.system import SYSTEMS, System
from treeflash.cli.console import guarded
from treeflash.config import AUTO, METHODS
from treeflash.errors import ConfigError
from treeflash.evaluation.records import MEAN
from treeflash.hub.models import resolve_target
from treeflash.text.prompt import encode, read_rows
from treeflash.text.tokenizer import Tokenizer

BATCHED = {"treeflash": METHODS, "transformers": ("generate",), "mlx-lm": ("batch_generate",)}
"""The methods of each system that decode several prompts at once."""
FIGURES = ("tokens_per_s", "first_token_s", "ratio_to_ar", "ratio_to_padded", "ratio_to_one")


class Case(NamedTuple):
    """The records that are aggregated into one row."""

    set: str
    concurrency: int
    system: str
    method: str

    @property
    def columns(self) -> Row:
        """The columns that name the case, without the set."""
        return {"concurrency": self.concurrency, "system": self.system, "method": self.method}


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=8, max_tokens=64)
    options.add_numbers(
        "--concurrency",
        [1, 2, 4, 8, 16, 32],
        "numbers of sequences at once; --limit is rounded up to a multiple of each",
    )
    others = ("generate", "batch_generate")
    options.add_names(
        "--methods",
        [*METHODS, *others],
        "methods of any system",
        ["ar", "ddtree", "treeflash", *others],
    )
    options.add_argument("--backend", default="cuda", help="(default: cuda)")
    add_pair_options(options)
    return options


def make_groups(
    prompts: Sequence[list[int]], limit: int, concurrency: int, name: str
) -> list[Sequence[list[int]]]:
    """Group the first prompts, at least `limit` of them, in groups of equal size."""
    count = -(-limit // concurrency) * concurrency
    if len(prompts) < count:
        raise ConfigError(
            f"{name} has {len(prompts)} prompts, but {count} are needed for groups of "
            f"{concurrency}; lower --limit or --concurrency"
        )
    return [prompts[first : first + concurrency] for first in range(0, count, concurrency)]


def make_rows(records: Sequence[Row]) -> list[Row]:
    """Make one row for each case, and one for its mean over sets.

    `first_token_s` is a median. Ratios compare tokens per second: `ratio_to_ar` with treeflash's
    plain decoding and `ratio_to_padded` with transformers' padded `generate` at the same
    concurrency, `ratio_to_one` with the same system and one sequence at a time. `equal` counts the
    sequences with the same tokens as treeflash's plain decoding at this concurrency.
    """
    groups: dict[Case, list[Row]] = {}
    for x in records:
        case = Case(x["set"], x["prompts"], x["system"], x["method"])
        groups.setdefault(case, []).append(x)
    texts = {case: [ids for x in groups[case] for ids in x["token_ids"]] for case in groups}
    speeds = {
        case: sum(map(len, texts[case])) / sum(x["seconds"] for x in groups[case])
        for case in groups
    }

    def ratio(case: Case, base: Case) -> float | None:
        return speeds[case] / speeds[base] if base in speeds else None

    rows = []
    for case in groups:
        plain = case._replace(system="treeflash", method="ar")
        padded = case._replace(system="transformers", method="generate")
        rows.append(
            {
                "set": case.set,
                **case.columns,
                "tokens_per_s": speeds[case],
                "first_token_s": median(first for x in groups[case] for first in x["first"]),
                "ratio_to_ar": ratio(case, plain),
                "ratio_to_padded": ratio(case, padded),
                "ratio_to_one": ratio(case, case._replace(concurrency=1)),
                "equal": sum(map(eq, texts[case], texts.get(plain, ()))),
                "prompts": len(texts[case]),
            }
        )
    cases = dict.fromkeys(case._replace(set=MEAN) for case in groups)
    return rows + [mean_row(rows, case.columns, FIGURES) for case in cases]


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    if args.backend == "cpu":  # PyTorch's backend by its other name
        args.backend, args.device = "cuda", "cpu"
    target = resolve_target(args.target)
    tokenizer = Tokenizer.from_folder(target)
    groups = {}
    for path in args.prompts:
        prompts = [encode(tokenizer, row.turns[0]).token_ids for row in read_rows(path)]
        for number in args.concurrency:
            groups[path.stem, number] = make_groups(prompts, args.limit, number, path.stem)
    systems = [x for x in SYSTEMS if x.backend == args.backend and x.bits is None]
    systems = systems or [System(name="treeflash", backend=args.backend)]
    threads = os.cpu_count() or 1
    setup, comparison = setup_of(args, target, tokenizer), Comparison()
    with running([(x, threads) for x in systems], args, setup, comparison) as peers:
        for peer in peers:
            batched = BATCHED[peer.system.name]
            comparison.add(peer, [AUTO], [x for x in args.methods if x in batched])
        for number in args.concurrency:
            comparison.run(groups[args.prompts[0].stem, number][0], args.max_tokens)
            for name in [path.stem for path in args.prompts]:
                for n, group in enumerate(track(groups[name, number], f"{name}, {number} at once")):
                    comparison.run(group, args.max_tokens, keep={"set": name, "group": n})
    comparison.check()
    if not any(x["system"] == "treeflash" for x in comparison.records):
        raise ConfigError("treeflash was not measured; see the reasons above, or --methods")
    rows = make_rows(comparison.records)
    pair = {"backend": args.backend, **{x: peers[-1].description[x] for x in ("device", "dtype")}}
    title = f"throughput, {', '.join(pair.values())}, {args.max_tokens} tokens per prompt"
    show(title, [row for row in rows if row["set"] == MEAN])
    results = {"max_tokens": args.max_tokens, "rows": rows, "skipped": comparison.skipped}
    write_json(args.json, "throughput", pair | results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
