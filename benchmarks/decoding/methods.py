"""Block efficiency, speed and time by phase of the decoding methods, by budget and prompt set.

    python -m benchmarks.decoding.methods gsm8k.jsonl --budgets 16,64,auto [--json FILE]

Every prompt is decoded by every method in turn before the next prompt, so that a disturbance of the
machine affects all of them. Every method is made to write the tokens of plain decoding (`ar`). In
half precision a near-tie can resolve differently in a tree than alone, and then the sequences
diverge; sequences differ in how easy they are to draft by more than methods do. Speeds and ratios
are of the total time of a set's iterations. Nodes of a tree and milliseconds of the phases of an
iteration are medians; work that a phase leaves running on the device counts towards the next phase
that waits for it.

`--suffix on,off` compares the trees of a drafter with and without copies of the text;
`benchmarks/prompts` has sets whose answers repeat their prompts.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from rich.progress import track

from benchmarks.common import Parser, Row, command, describe, mean_row, publish
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
from treeflash.decoding.loop import Step
from treeflash.decoding.sampling import SampledTokens
from treeflash.errors import ConfigError
from treeflash.language_model import LanguageModel
from treeflash.text.generation import PHASES, Generation, mean
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


class Text(NamedTuple):
    """A generated text, and the steps in which it was decoded after the prefill."""

    generation: Generation
    steps: Sequence[Step]


def decode(model: LanguageModel, prompt: Prompt, case: Case, **options: Any) -> Text:
    """Decode a prompt as the case says."""
    stream = model.stream(prompt, **case.options, **options)
    return Text(stream.run(), stream.steps[1:])


def figures(texts: Sequence[Text], plain: Sequence[Text]) -> Row:
    """Return the figures of texts, also relative to plain decoding of their prompts."""
    steps = [step for text in texts for step in text.steps]
    seconds = {name: [step.seconds.get(name, 0.0) for step in steps] for name in PHASES[1:]}
    return {
        "block_efficiency": mean(x for text in texts for x in text.generation.accepted_lengths),
        "tokens_per_s": speed(texts),
        "ratio_to_ar": speed(texts) / speed(plain),
        "nodes": round(median(len(step.tree) for step in steps if step.tree is not None)),
        **{f"{name}_ms": 1000 * median(values) for name, values in seconds.items()},
    }


def speed(texts: Sequence[Text]) -> float:
    """Return the tokens of the iterations of all texts per second."""
    generations = [text.generation for text in texts]
    return sum(sum(x.accepted_lengths) for x in generations) / sum(x.decode_s for x in generations)


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


def measure(model: LanguageModel, args: Namespace, cases: Sequence[Case]) -> list[Row]:
    """Return the rows of all sets and their means; the first case is plain decoding."""
    forced = ForcedBackend(model.backend)
    # A budget learns from one kind of trees alone.
    models = {
        suffix: replace(model, backend=forced, adaptive_budgets=AdaptiveBudgets())
        for suffix in (None, False, True)
    }
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
    rows: list[Row] = []
    for path in args.prompts:
        texts: dict[Case, list[Text]] = {case: [] for case in cases}
        for prompt in track(read_rows(path)[: args.limit], path.stem):
            forced.tokens = ()
            rounds: dict[Case, list[Text]] = {case: [] for case in cases}
            for _, case in product(range(args.rounds), cases):
                text = decode(models[case.suffix], prompt.turns[0], case, **options)
                forced.tokens = forced.tokens or text.generation.token_ids
                assert text.generation.token_ids == forced.tokens
                rounds[case].append(text)
            if len(forced.tokens) == 1:
                continue  # a text of one token has no iteration, hence no speed
            for case, group in rounds.items():
                by_time = sorted(group, key=lambda text: text.generation.decode_s)
                texts[case].append(by_time[(len(group) - 1) // 2])
        if not texts[cases[0]]:
            raise ConfigError(f"no text of {path.stem} has an iteration; raise --max-tokens")
        for case, found in texts.items():
            row = {"set": path.stem, **case.columns, **figures(found, texts[cases[0]])}
            rows.append(row | {"prompts": len(found)})
    means = [name for name in rows[0] if name not in ("set", "prompts", *cases[0].columns)]
    return rows + [mean_row(rows, case.columns, means) for case in cases]


@command(parser)
def main(args: Namespace) -> int:
    """Measure, print, write."""
    suffixes = [switch == "on" for switch in args.suffix]
    cases = make_cases(args.methods, args.budgets, suffixes)
    model = load_model(args)
    warm_up(model.backend, 1)
    rows = measure(model, args, cases)
    return publish(args, describe(model.backend) | {"max_tokens": args.max_tokens}, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
