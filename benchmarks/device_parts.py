"""What reports about all kinds of accelerators share: a real pair's speed and texts, tiny pairs.

A part of a report takes a `Device` and the `Part` that it adds to. `cuda_parts` and `mlx_parts`
have the table of the parts of each kind, in the order in which they run: what a person waits for
comes first, and what compiles kernels for minutes comes last.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from shutil import which
from typing import Any, ClassVar, TypeAlias

from benchmarks.common import Row, first_difference, supported_methods
from benchmarks.report import LeftOutError, Part
from treeflash.cli.options import load_model, locate_model
from treeflash.config import GIB, DecodeConfig, LoadConfig, Method, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig, decode
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash.language_model import LanguageModel, LocatedPair
from treeflash.registry import loader
from treeflash.text.generation import PHASES, Generation, mean
from treeflash.text.prompt import encode
from treeflash.text.tokenizer import Tokenizer

PROMPTS = (
    "Natalia sold clips to 48 of her friends in April, and half as many in May. How many clips did "
    "she sell in both months? Reason step by step.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "Why is the sky blue? Answer in one paragraph.",
)
TINY_METHODS: tuple[Method, ...] = ("dflash", "ddtree", "treeflash", "suffix")
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "sampled": SamplingConfig(temperature=0.8, top_p=0.9, seed=1),
}
TOKENS = 60
"""Tokens of a text of a tiny pair."""
TINY_PROMPT = [3, 4, 5] * 40


@dataclass
class Device:
    """The device that a report is about, and what its parts share.

    Attributes:
        args: the command line.
        folder: for files of the parts.
        end: when the time for all parts is over.
        missing: why there is no real target; empty if there is one.
    """

    args: Any
    folder: Path
    end: float
    missing: str = ""

    backend: ClassVar[str]
    hidden_size: ClassVar[int] = 32  # hidden size of tiny pairs
    key_dim: ClassVar[int] = 8  # width of keys and states of their recurrent layers

    @property
    def is_late(self) -> bool:
        """Whether the time for all parts is over."""
        return time.time() > self.end

    def load(self, pair: tuple[Path, Path], **settings: Any) -> Any:
        """Load a pair on the device; see `LoadConfig`."""
        return loader(self.backend)(*pair, LoadConfig(device=self.args.device, **settings))

    def locate(self) -> LocatedPair:
        """Locate the real pair; a part without one is left out."""
        if self.missing:
            raise LeftOutError(f"there is no target: {self.missing}")
        return locate_model(self.args)

    def load_model(self, **changes: Any) -> LanguageModel:
        """Load the real pair; a part without one is left out."""
        self.locate()
        return load_model(self.args, **changes)

    def write_tiny(self, family: str = "qwen3") -> tuple[Path, Path]:
        """Write a pair of tiny models of random weights into a new folder."""
        from treeflash.testing.models import write_pair

        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return write_pair(
            *(folder, family), vocab_size=500, hidden_size=self.hidden_size, key_dim=self.key_dim
        )


Find: TypeAlias = Callable[[Any, Part], object]
"""A part: it takes the device, and adds what it finds."""


def run_command(part: Part, table: str, *command: str) -> None:
    """Add the lines that a command of the system prints, if the system has it."""
    if (path := which(command[0])) is None:
        return
    done = subprocess.run(
        [path, *command[1:]], capture_output=True, text=True, check=False, timeout=30
    )
    for line in done.stdout.splitlines():
        part.add(table, command=command[0], line=line.strip())


def text_problem(what: str, plain: Sequence[int], tokens: Sequence[int]) -> str | None:
    """Return a line if a text differs from plain decoding's; None if it does not."""
    if list(plain) == list(tokens):
        return None
    place = first_difference(plain, tokens)
    return f"{what} differs from plain decoding at token {place} of {len(plain)}"


def tiny_texts(
    device: Device,
    part: Part,
    variants: Mapping[str, tuple[str, Mapping[str, Any]]],
    refused: Callable[[str], None],
) -> None:
    """Compare the texts of tiny pairs with plain decoding's.

    Args:
        device: loads them.
        part: gets the rows and the problems.
        variants: families and settings by name. In all of them every method writes the text of
            plain decoding, unless two logits are closer than the rounding of float32.
        refused: takes a line about a variant that the backend refuses.
    """
    for name, (family, settings) in variants.items():
        try:
            backend = device.load(device.write_tiny(family), **settings)
        except (ConfigError, UnsupportedModelError) as error:
            refused(f"{name}: {error}")
            continue
        for sampling, config in SAMPLINGS.items():
            plain = tiny_text(backend, method="ar", sampling=config)
            for method in TINY_METHODS:
                found = tiny_text(backend, method=method, budget=12, sampling=config)
                case = {"pair": name, "method": method, "sampling": sampling}
                same = first_difference(plain, found)
                part.add("texts", **case, tokens=len(plain), equal_up_to=same)
                if line := text_problem(f"{method}, {sampling}, with {name}", plain, found):
                    part.problem(line)


def tiny_texts_together(device: Device, part: Part) -> None:
    """Compare texts that are decoded at once, of all methods, with plain decoding's.

    The second time their prompt is not run again: they go on from the state that was stored.
    """
    backend = device.load(device.write_tiny(), dtype="float32")
    plain = {
        name: tiny_text(backend, method="ar", sampling=sampling)
        for name, sampling in SAMPLINGS.items()
    }
    cases = list(product(TINY_METHODS, SAMPLINGS))
    config, cache = SchedulerConfig(max_parallel=len(cases)), PrefixCache(GIB)
    for how in (f"{len(cases)} at once", f"{len(cases)} at once after a stored prompt"):
        found: dict[tuple[Method, str], list[int]] = {case: [] for case in cases}
        requests = [
            Request(
                prompt_ids=TINY_PROMPT,
                config=DecodeConfig(
                    method=method, budget=12, max_tokens=TOKENS, sampling=SAMPLINGS[sampling]
                ),
                tag=(method, sampling),
            )
            for method, sampling in cases
        ]
        for request, step in Scheduler(backend, config, prefix_cache=cache).decode(requests):
            found[request.tag] += step.tokens
        for (method, sampling), tokens in found.items():
            expected = plain[sampling]
            same = first_difference(expected, tokens)
            case = {"pair": f"float32, {how}", "method": method, "sampling": sampling}
            part.add("texts", **case, tokens=len(expected), equal_up_to=same)
            if line := text_problem(f"{method}, {sampling}, {how}", expected, tokens):
                part.problem(line)
    cache.close()


def tiny_text(backend: Any, **settings: Any) -> list[int]:
    """Return the new tokens of a tiny pair's text."""
    config = DecodeConfig(max_tokens=TOKENS, **settings)
    steps = decode(backend, Request(prompt_ids=TINY_PROMPT, config=config))
    return [token for step in steps for token in step.tokens]


def prompt_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of the prompts of a real pair."""
    return [encode(tokenizer, prompt).token_ids for prompt in PROMPTS]


def speed(device: Device, part: Part) -> LanguageModel:
    """Measure every method of the real pair; returns the pair."""
    model = device.load_model()
    methods = supported_methods(model.backend)
    for row in method_rows(model, methods, prompt_ids(model.tokenizer), device.args.max_tokens):
        part.add("methods", **row)
    return model


def exact(device: Device, part: Part) -> None:
    """Measure the real pair in exact mode, where all texts must be plain decoding's."""
    try:
        model = device.load_model(exact=True)
    except (ConfigError, UnsupportedModelError) as error:
        part.note(f"exact mode is refused: {error}")
        return
    methods = supported_methods(model.backend)
    prompts = prompt_ids(model.tokenizer)[:1]
    for row in method_rows(model, methods, prompts, min(64, device.args.max_tokens)):
        part.add("methods", **row)
        if row["equal"] < row["prompts"]:
            part.problem(f"{row['method']} in exact mode differs from plain decoding")


def method_rows(
    model: LanguageModel, methods: Sequence[Method], prompts: Sequence[list[int]], max_tokens: int
) -> list[Row]:
    """Measure methods, plain decoding first, which take turns; the first prompt warms up.

    `equal` counts the texts of plain decoding, and `equal_up_to` is the first token that differs in
    any text. In half precision without exact mode, two tokens of nearly equal probability can swap.
    """
    generations: dict[Method, list[Generation]] = {method: [] for method in methods}
    seconds = dict.fromkeys(methods, 0.0)
    for number, (prompt, method) in enumerate(product([prompts[0], *prompts], methods)):
        started = time.perf_counter()
        generation = model.generate(prompt, method=method, max_tokens=max_tokens)
        if number >= len(methods):
            seconds[method] += time.perf_counter() - started
            generations[method].append(generation)
    plain = generations[methods[0]]
    rows: list[Row] = []
    for method, found in generations.items():
        lengths = [n for generation in found for n in generation.accepted_lengths]
        texts = [(x.token_ids, y.token_ids) for x, y in zip(plain, found, strict=True)]
        tokens_per_s = sum(len(ids) for _, ids in texts) / seconds[method]
        row: Row = {"system": "treeflash", "method": method, "tokens_per_s": tokens_per_s}
        row["ratio_to_ar"] = tokens_per_s / (rows[0]["tokens_per_s"] if rows else tokens_per_s)
        row |= {"block_efficiency": mean(lengths), "prompts": len(texts)}
        row |= {
            "equal": sum(x == y for x, y in texts),
            "equal_up_to": min(first_difference(*pair) for pair in texts),
        }
        for phase in PHASES[1:]:
            row[f"{phase}_ms"] = 1000 * sum(g.seconds[phase] for g in found) / max(1, len(lengths))
        rows.append(row)
    return rows


def peer_row(
    system: str, generate: Callable[[list[int]], Sequence[int]], prompts: Iterable[list[int]]
) -> Row:
    """Measure the plain decoding of another package; the first prompt warms up."""
    first, *rest = prompts
    generate(first)
    started = time.perf_counter()
    tokens = sum(len(generate(prompt)) for prompt in [first, *rest])
    seconds = time.perf_counter() - started
    return {"system": system, "method": "generate", "tokens_per_s": tokens / seconds}
