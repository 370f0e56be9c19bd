"""Texts of every way to decode compared with plain decoding of the same target.

    python -m benchmarks.decoding.equal_texts benchmarks/prompts/*.jsonl --target FILE.gguf
    python -m benchmarks.decoding.equal_texts benchmarks/prompts/*.jsonl --instructions AVX2

Prompts are pieces of the sets' prompts. Each way decodes all of them, and the texts that differ
from the plain text of the prompt alone are counted: drafted alone, eight at once, in groups of four
samples, after a beginning from the prefix cache, and after one from its disk tier. On a CPU,
`--instructions` leaves out the compiled code for better sets of instructions.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from operator import ne
from pathlib import Path
from typing import TypeAlias
from unittest.mock import patch

from rich.progress import track
from treeflash_cuda.cpu.ir_builder import ISAS

from benchmarks.common import Parser, Row, describe, read_prompts, show, write_json
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import GIB, Method, SamplingConfig
from treeflash.decoding import Request, SchedulerConfig
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.language_model import LanguageModel

SEED = 7
SAMPLES = 4
Texts: TypeAlias = list[list[int]]
Seeds: TypeAlias = Sequence[int | None]


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=100, max_tokens=12)
    options.add_number("--tokens", 280, "tokens of a prompt")
    options.add_names("--ways", WAYS, "ways to decode")
    isas = [isa.name for isa in ISAS]
    options.add_argument("--instructions", choices=isas, help="the best set to compile code for")
    add_model_options(options)
    return options


class Ways:
    """The ways to decode prompts with a model."""

    def __init__(self, model: LanguageModel, max_tokens: int) -> None:
        self.model, self.max_tokens = model, max_tokens

    def requests(self, prompts: Texts, seeds: Seeds, method: Method | None = None) -> list[Request]:
        """Make requests, which are greedy without a seed, and tagged with their numbers."""
        config = self.model.decode_config({"max_tokens": self.max_tokens, "stop_token_ids": ()})
        config = replace(config, method=method or config.method)
        samplings = [
            SamplingConfig(temperature=0.0 if seed is None else 1.0, seed=seed or 0)
            for seed in seeds
        ]
        return [
            Request(prompt_ids=prompt, config=replace(config, sampling=sampling), tag=number)
            for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
        ]

    def decode(
        self,
        groups: Sequence[Sequence[Request]],
        cache: PrefixCache | None = None,
        parallel: int = 1,
    ) -> tuple[Texts, int]:
        """Return the texts in order, and how many began with tokens from a cache."""
        scheduler = self.model.scheduler(SchedulerConfig(max_parallel=parallel), cache)
        for group in groups:
            scheduler.submit_group(group)
        tokens: dict[int, list[int]] = defaultdict(list)
        cached = 0
        for request, step in scheduler.decode():
            cached += request.tag not in tokens and step.cached_tokens > 0
            tokens[request.tag] += step.tokens
        scheduler.close()
        return [tokens[number] for number in sorted(tokens)], cached

    def plain(self, prompts: Texts, seeds: Seeds) -> Texts:
        """Decode each prompt alone, without drafts."""
        requests = self.requests(prompts, seeds, method="ar")
        return [
            self.decode([[request]])[0][0]
            for request in track(requests, "plain decoding", transient=True)
        ]


class Comparison:
    """Texts of plain decoding, and rows of the ways that are compared with them."""

    def __init__(self, model: LanguageModel, prompts: Texts, max_tokens: int) -> None:
        self.ways, self.prompts = Ways(model, max_tokens), prompts
        self.greedy: Seeds = [None] * len(prompts)
        self.seeds: Seeds = range(SEED, SEED + len(prompts))
        self.rows: list[Row] = []

    @cached_property
    def plain(self) -> Texts:
        """The greedy texts of the prompts."""
        return self.ways.plain(self.prompts, self.greedy)

    @cached_property
    def sampled(self) -> Texts:
        """The sampled texts of the prompts."""
        return self.ways.plain(self.prompts, self.seeds)

    def add(self, way: str, texts: Texts, expected: Texts, cached: int = 0) -> None:
        """Add a row, and print what differs."""
        differ = sum(map(ne, texts, expected))
        self.rows.append({"way": way, "texts": len(texts), "cached": cached, "differ": differ})
        print(f"{way}: {differ} of {len(texts)} texts differ", file=sys.stderr)

    def alone(self) -> None:
        """Decode each prompt alone, with drafts."""
        requests = self.ways.requests(self.prompts, self.greedy)
        texts = [self.ways.decode([[request]])[0][0] for request in requests]
        self.add("drafted alone", texts, self.plain)
        requests = self.ways.requests(self.prompts, self.seeds)
        texts = [self.ways.decode([[request]])[0][0] for request in requests]
        self.add("drafted alone, sampled", texts, self.sampled)

    def batches(self) -> None:
        """Decode eight prompts at once."""
        requests = self.ways.requests(self.prompts, self.greedy)
        texts, _ = self.ways.decode([[request] for request in requests], parallel=8)
        self.add("eight at once", texts, self.plain)
        requests = self.ways.requests(self.prompts, self.seeds)
        texts, _ = self.ways.decode([[request] for request in requests], parallel=8)
        self.add("eight at once, sampled", texts, self.sampled)

    def samples(self) -> None:
        """Decode groups of samples, whose prompt runs once."""
        few = [x for x in self.prompts[: len(self.prompts) // SAMPLES] for _ in range(SAMPLES)]
        seeds = self.seeds[: len(few)]
        requests = self.ways.requests(few, seeds)
        groups = [requests[n : n + SAMPLES] for n in range(0, len(few), SAMPLES)]
        texts, cached = self.ways.decode(groups, parallel=SAMPLES)
        self.add(f"groups of {SAMPLES} samples", texts, self.ways.plain(few, seeds), cached)

    def caches(self) -> None:
        """Decode second turns, after their beginnings from memory and from a disk."""
        pairs = zip(self.prompts, self.plain, strict=True)
        longer = [[*prompt, *text, *prompt[:9]] for prompt, text in pairs]
        expected = self.ways.plain(longer, self.greedy)
        first_turns, second_turns = (
            [[request] for request in self.ways.requests(turns, self.greedy)]
            for turns in (self.prompts, longer)
        )
        with tempfile.TemporaryDirectory() as folder:

            def new_cache() -> PrefixCache:
                return PrefixCache(16 * GIB, self.ways.model.disk_cache(Path(folder), 64 * GIB))

            cache = new_cache()
            self.ways.decode(first_turns, cache)
            texts, cached = self.ways.decode(second_turns, cache)
            cache.close()
            self.add("after a beginning in memory", texts, expected, cached)
            cache = new_cache()
            texts, cached = self.ways.decode(second_turns, cache)
            cache.close()
            self.add("after a beginning on a disk", texts, expected, cached)


def pieces(model: LanguageModel, sets: Sequence[Path], tokens: int) -> Iterator[list[int]]:
    """Yield pieces of the prompts of sets, each of so many tokens, of one prompt after another."""
    whole = [x for path in sets for x in read_prompts(model.tokenizer, path, sys.maxsize)]
    ids = [token for prompt in whole for token in prompt]
    step = max(1, tokens // 4)
    while True:
        for first in range(0, len(ids) - tokens, step):
            yield ids[first : first + tokens]
        step = max(1, step // 2 + 1)


WAYS: Mapping[str, Callable[[Comparison], None]] = {
    "alone": Comparison.alone,
    "batches": Comparison.batches,
    "samples": Comparison.samples,
    "caches": Comparison.caches,
}


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print."""
    args = parser().parse_args(argv)
    names = [isa.name for isa in ISAS]
    first = 0 if args.instructions is None else names.index(args.instructions)
    with patch("treeflash_cuda.cpu.machine_code.ISAS", ISAS[first:]):
        model = load_model(args)
    prompts = list(islice(pieces(model, args.prompts, args.tokens), args.limit))
    comparison = Comparison(model, prompts, args.max_tokens)
    for way in args.ways:
        WAYS[way](comparison)
    rows, pair = comparison.rows, describe(model.backend)
    show(f"texts that differ from plain decoding, {', '.join(pair.values())}", rows)
    write_json(args.json, "equal_texts", pair | {"rows": rows})
    return int(any(row["differ"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
