"""Block efficiency and speed of the decoding methods, by budget and prompt set.

    python -m benchmarks.decoding.methods gsm8k.jsonl --budgets 16,64,auto [--json FILE]

Every prompt is decoded by every method in turn before the next prompt, so that a disturbance of the
machine affects all of them. Every method is made to write the tokens of plain decoding (`ar`). In
half precision a near-tie can resolve differently in a tree than alone, and then the sequences
diverge; sequences differ in how easy they are to draft by more than methods do. Ratios compare the
total time of a set's sequences.

`--suffix on,off` compares the trees of a drafter with and
without copies of the text; `benchmarks/prompts` has sets whose answers repeat their prompts.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from rich.progress import track

from benchmarks.common import (
    Parser,
    Row,
    describe,
    mean_row,
    show,
    write_json,
)
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import AUTO, METHODS, Budget, Method
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.interfaces import (
    Backend,
    Pass,
    Prefill,
    SequenceState,
    TreeVerifier,
    Verify,
    warm_up,
)
from treeflash.decoding.sampling import SampledTokens
from treeflash.evaluation.records import MEAN
from treeflash.language_model import LanguageModel
from treeflash.text.generation import Generation, mean
from treeflash.text.prompt import Prompt, read_rows

TREE_METHODS = ("ddtree", "treeflash", "suffix")
DRAFTER_TREES = ("ddtree", "treeflash")


class ForcedBackend:
    """A backend whose target writes given tokens: it runs as usual, but its tokens are replaced.

    Attributes:
        tokens: new tokens of the next sequence; without any, and beyond their end, the target
            chooses freely.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.tokens: Sequence[int] = ()
        self._prompt_lengths: MutableMapping[SequenceState, int] = WeakKeyDictionary()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    @property
    def verifier(self) -> _ForcedVerifier:
        return _ForcedVerifier(self.backend.verifier, self.tokens, self._prompt_lengths)


@dataclass(frozen=True, eq=False)
class _ForcedVerifier:
    verifier: TreeVerifier
    tokens: Sequence[int]
    prompt_lengths: MutableMapping[SequenceState, int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.verifier, name)

    def run(self, work: Sequence[Prefill | Verify]) -> Pass:
        found = self.verifier.run(work)
        return replace(found, sampled=list(map(self._force, work, found.sampled)))

    def _force(self, item: Prefill | Verify, sampled: SampledTokens | None) -> SampledTokens | None:
        if isinstance(item, Prefill):
            self.prompt_lengths[item.state] = item.state.length
            return sampled
        if sampled is None:
            return None
        root = item.state.length - self.prompt_lengths[item.state]
        following = np.array(self.tokens[root + 1 :], np.int32)
        known = item.tree.depths < len(following)
        tokens = sampled.tokens.copy()
        tokens[known] = following[item.tree.depths[known]]
        return replace(sampled, tokens=tokens)


class Case(NamedTuple):
    """A method at a budget; `suffix` is None for methods that do not choose."""

    method: Method
    budget: Budget
    suffix: bool | None

    @property
    def columns(self) -> Row:
        """The columns that name the case."""
        size = 1 if self.method == "ar" else self.budget
        suffix = None if self.suffix is None else "on" if self.suffix else "off"
        return {"method": self.method, "budget": size, "suffix": suffix}

    @property
    def options(self) -> dict[str, Any]:
        """The options of `generate`."""
        suffix = {} if self.suffix is None else {"suffix": self.suffix}
        return {"method": self.method, "budget": self.budget, **suffix}


Runs: TypeAlias = dict[Case, list[Generation]]
"""Generations of the same prompts in the same order, by case."""


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=8, max_tokens=128)
    options.add_number("--rounds", 1, "times that a prompt is decoded; the median time counts")
    options.add_names("--methods", METHODS, "methods")
    options.add_budgets([16, 64, AUTO], "budgets of tree methods")
    options.add_names(
        "--suffix", ["on", "off"], "whether trees of a drafter also copy the text", ["on"]
    )
    options.add_decode_options("temperature", "seed")
    add_model_options(options)
    return options


def make_cases(
    methods: Sequence[Method],
    budgets: Sequence[Budget],
    suffixes: Sequence[bool],
) -> list[Case]:
    """Make every method at every budget, plain decoding first; chains at the largest one."""
    largest = max((budget for budget in budgets if budget != AUTO), default=AUTO)
    plain: Method = "ar"
    return [
        Case(method, budget, suffix)
        for method in dict.fromkeys([plain, *methods])
        for budget in (budgets if method in TREE_METHODS else [largest])
        for suffix in (suffixes if method in DRAFTER_TREES else [None])
    ]


def set_row(name: str, case: Case, runs: Runs) -> Row:
    """Return the figures of a case on one prompt set."""
    generations, plain = runs[case], next(iter(runs.values()))
    lengths = [length for generation in generations for length in generation.accepted_lengths]
    seconds = sum(generation.decode_s for generation in generations)
    return {"set": name, **case.columns} | {
        "block_efficiency": mean(lengths),
        "tokens_per_s": sum(lengths) / seconds,
        "ratio_to_ar": sum(generation.decode_s for generation in plain) / seconds,
        "prompts": len(generations),
    }


def measure(model: LanguageModel, args: Any, cases: Sequence[Case]) -> list[Row]:
    """Build the rows of all sets and their mean."""
    forced = ForcedBackend(model.backend)
    # A budget learns from one kind of trees alone.
    models = {
        suffix: replace(model, backend=forced, adaptive_budgets=AdaptiveBudgets())
        for suffix in (None, False, True)
    }
    sampling = {"temperature": args.temperature, "seed": args.seed}

    def run(prompt: Prompt, case: Case) -> Generation:
        return models[case.suffix].generate(
            prompt, max_tokens=args.max_tokens, **sampling, **case.options
        )

    rows: list[Row] = []
    for path in args.prompts:
        runs: Runs = {case: [] for case in cases}
        for prompt in track(read_rows(path)[: args.limit], path.stem):
            forced.tokens = ()
            plain = run(prompt.turns[0], cases[0])
            if not plain.accepted_lengths:
                continue  # a sequence of one token has no iteration, hence no speed
            forced.tokens = plain.token_ids
            rounds: Runs = {case: [] for case in cases}
            rounds[cases[0]].append(plain)
            for number in range(args.rounds):
                for case in cases[number == 0 :]:
                    rounds[case].append(run(prompt.turns[0], case))
                    assert rounds[case][-1].token_ids == plain.token_ids
            for case, group in rounds.items():
                by_time = sorted(group, key=lambda generation: generation.decode_s)
                runs[case].append(by_time[(len(group) - 1) // 2])
        rows += [set_row(path.stem, case, runs) for case in cases]
    figures = ("block_efficiency", "tokens_per_s", "ratio_to_ar")
    return rows + [mean_row(rows, case.columns, figures) for case in cases]


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    suffixes = [switch == "on" for switch in args.suffix]
    cases = make_cases(args.methods, args.budgets, suffixes)
    model = load_model(args)
    warm_up(model.backend, 1)
    rows = measure(model, args, cases)
    pair = describe(model.backend)
    title = f"{', '.join(pair.values())}, {args.max_tokens} tokens per prompt"
    show(f"methods, {title}", [row for row in rows if row["set"] == MEAN])
    write_json(args.json, "methods", pair | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
