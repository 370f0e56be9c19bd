"""The time of an iteration by phase, for every method.

    python -m benchmarks.decoding.iteration gsm8k.jsonl [--budgets 16,64] [--json FILE]

Work that a phase leaves running on the device counts towards the next phase that waits for it.
`outside` is the share of building trees and committing paths, which lie outside the forward passes
of both models. All times are median milliseconds, and methods take turns with each prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain, islice, product
from statistics import median

from benchmarks.common import (
    Parser,
    Row,
    describe,
    read_prompts,
    show,
    write_json,
)
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import DecodeConfig, Method, SamplingConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import Step
from treeflash.errors import ConfigError
from treeflash.text.generation import PHASES

WARM_UP = 2  # steps of a sequence that are not measured: the prefill and the first iteration


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=4, max_tokens=64)
    options.add_numbers("--budgets", [16, 64], "nodes of the trees whose phases are timed")
    options.add_decode_options("temperature", "top_p")
    add_model_options(options)
    return options


def make_cases(backend: Backend, budgets: Sequence[int]) -> list[tuple[Method, int]]:
    """List plain decoding and the methods that the pair supports, trees at every budget."""
    cases: list[tuple[Method, int]] = [("ar", 1)]
    if backend.drafter is not None:
        cases += [("dflash", max(budgets)), *(("ddtree", nodes) for nodes in budgets)]
    if backend.head is not None:
        cases += (("treeflash", nodes) for nodes in budgets)
    return cases


def phase_rows(
    backend: Backend, prompts: Sequence[Sequence[int]], configs: Sequence[DecodeConfig]
) -> list[Row]:
    """Measure the median time of each phase of an iteration.

    Each prompt is decoded with every configuration before the next one.
    """
    steps: list[list[Step]] = [[] for _ in configs]
    for ids, (found, config) in product(prompts, zip(steps, configs, strict=True)):
        request = Request(prompt_ids=ids, config=config)
        found += islice(decode(backend, request), WARM_UP, None)
    return list(map(_phase_row, configs, steps))


def _phase_row(config: DecodeConfig, steps: Sequence[Step]) -> Row:
    if not steps:
        raise ConfigError("no sequence has three steps; raise --max-tokens or --limit")
    times = {
        f"{phase}_ms": 1000 * median(step.seconds.get(phase, 0.0) for step in steps)
        for phase in PHASES[1:]
    }
    total = sum(times.values())
    return {
        "method": config.method,
        "budget": 1 if config.method == "ar" else config.budget,
        "nodes": round(median(len(step.tree) for step in steps if step.tree is not None)),
        **times,
        "iteration_ms": total,
        "outside": (times["tree_ms"] + times["commit_ms"]) / total,
    }


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    sampling = SamplingConfig(temperature=args.temperature, top_p=args.top_p)
    model = load_model(args)
    sets = [read_prompts(model.tokenizer, path, args.limit) for path in args.prompts]
    configs = [
        DecodeConfig(method=method, budget=budget, max_tokens=args.max_tokens, sampling=sampling)
        for method, budget in make_cases(model.backend, args.budgets)
    ]
    phases = phase_rows(model.backend, list(chain.from_iterable(sets)), configs)
    pair = describe(model.backend)
    show(f"phases, {', '.join(pair.values())}", phases)
    write_json(args.json, "iteration", pair | {"phases": phases})
    return 0


if __name__ == "__main__":
    sys.exit(main())
