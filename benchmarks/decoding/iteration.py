"""The time of an iteration by phase, and of a target forward pass by nodes and context.

    python -m benchmarks.decoding.iteration gsm8k.jsonl [--parts phases,verify]

- `phases`: milliseconds of an iteration by phase, for every method. Work that a phase leaves
  running on the device counts towards the next phase that waits for it. `outside` is the share of
  building trees and committing paths, which lie outside the forward passes of both models.
- `verify`: milliseconds of a target forward pass by nodes of the tree and committed positions.

All times are medians. Methods take turns with each prompt, and tree sizes with each call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain, islice, product
from statistics import median

from benchmarks.common import (
    Parser,
    Row,
    alternate_ms,
    describe,
    random_prompt,
    random_tree,
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
from treeflash.decoding.session import SequenceSession
from treeflash.errors import ConfigError
from treeflash.text.generation import PHASES

PARTS = ("phases", "verify")
WARM_UP = 2  # steps of a sequence that are not measured: the prefill and the first iteration


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=4, max_tokens=64)
    options.add_numbers("--budgets", [16, 64], "nodes of the trees whose phases are timed")
    options.add_decode_options("temperature", "top_p")
    options.add_numbers("--sizes", [2**n for n in range(10)], "nodes of the trees of `verify`")
    options.add_numbers("--contexts", [64, 1024, 4096], "committed positions of `verify`")
    options.add_number("--repeats", 7, "calls per median")
    options.add_names("--parts", PARTS, "what to measure")
    add_model_options(options)
    return options


def check_positions(backend: Backend, contexts: Sequence[int], sizes: Sequence[int]) -> None:
    """Raise a ConfigError if the largest tree after the longest context has too many positions."""
    if max(contexts) + max(sizes) > backend.max_positions:
        raise ConfigError(
            f"a tree of {max(sizes)} nodes after {max(contexts)} positions exceeds the target's "
            f"{backend.max_positions} positions; lower --contexts"
        )


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


def verify_rows(
    backend: Backend, contexts: Sequence[int], sizes: Sequence[int], repeats: int
) -> list[Row]:
    """Measure the target's forward pass over a random tree, by context and nodes."""
    rows = []
    trees = [random_tree(backend.vocab_size, size) for size in sizes]
    for context in contexts:
        with SequenceSession(backend, capacity=context + max(sizes)) as session:
            if context:
                session.extend(random_prompt(backend.vocab_size, context))
            calls = [lambda s=session, t=tree: s.verify(t) for tree in trees]
            for tree, ms in zip(trees, alternate_ms(calls, repeats), strict=True):
                rows.append({"context": context, "nodes": len(tree), "verify_ms": ms})
    return rows


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    sampling = SamplingConfig(temperature=args.temperature, top_p=args.top_p)
    model = load_model(args)
    if "verify" in args.parts:
        check_positions(model.backend, args.contexts, args.sizes)
    results: dict[str, list[Row]] = {}
    if "phases" in args.parts:
        sets = [read_prompts(model.tokenizer, path, args.limit) for path in args.prompts]
        prompts = list(chain.from_iterable(sets))
        configs = [
            DecodeConfig(
                method=method, budget=budget, max_tokens=args.max_tokens, sampling=sampling
            )
            for method, budget in make_cases(model.backend, args.budgets)
        ]
        results["phases"] = phase_rows(model.backend, prompts, configs)
    if "verify" in args.parts:
        results["verify"] = verify_rows(model.backend, args.contexts, args.sizes, args.repeats)
    pair = describe(model.backend)
    for name, table in results.items():
        show(f"{name}, {', '.join(pair.values())}", table)
    write_json(args.json, "iteration", pair | results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
