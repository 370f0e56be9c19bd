"""What reports about all kinds of accelerators share: a real pair's speed and texts, and tests.

A part of a report takes a `Device` and the `Part` that it adds to. `cuda_parts` and `mlx_parts`
have the table of the parts of each kind, in the order in which they run: what a person waits for
comes first, and tests, which compile kernels for minutes, come last.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import product
from shutil import which
from typing import Any, ClassVar, TypeAlias

import numpy as np

from benchmarks.common import (
    ROOT,
    Row,
    alternate_ms,
    first_difference,
    random_prompt,
    supported_methods,
)
from benchmarks.decoding.methods import Case, Text, decode, figures
from benchmarks.peers.comparison import decode_seconds, new_tokens
from benchmarks.peers.system import BASELINES, SYSTEMS, Peer, setup_of
from benchmarks.report import LeftOutError, Part
from treeflash.cli.options import load_model, locate_model
from treeflash.config import AUTO, Method
from treeflash.decoding.interfaces import Backend, DeviceReport, device_report
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash.hub.models import resolve_target
from treeflash.language_model import LanguageModel, LocatedPair
from treeflash.text.prompt import encode
from treeflash.text.tokenizer import Tokenizer

PROMPTS = (
    "Natalia sold clips to 48 of her friends in April, and half as many in May. How many clips did "
    "she sell in both months? Reason step by step.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "Why is the sky blue? Answer in one paragraph.",
)
SUITE = ROOT / "tests" / "conformance" / "test_device.py"


@dataclass
class Device:
    """The device that a report is about, and what its parts share.

    Attributes:
        args: the command line.
        end: when the time for all parts is over.
        missing: why there is no real target; empty if there is one.
    """

    args: Any
    end: float
    missing: str = ""

    backend: ClassVar[str]

    @property
    def is_late(self) -> bool:
        """Whether the time for all parts is over."""
        return time.time() > self.end

    def locate(self) -> LocatedPair:
        """Locate the real pair; a part without one is left out."""
        if self.missing:
            raise LeftOutError(f"there is no target: {self.missing}")
        return locate_model(self.args)

    def load_model(self, **changes: Any) -> LanguageModel:
        """Load the real pair; a part without one is left out."""
        self.locate()
        return load_model(self.args, **changes)


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


def tests(device: Device, part: Part) -> None:
    """Run the tests for devices: the first case of each, and then the others while there is time.

    They compare texts, logits and losses of tiny models, and say which kernels are not used.
    """
    import pytest

    if not SUITE.exists():
        raise LeftOutError(f"there is no {SUITE}")

    class Results:
        """What the tests find."""

        def __init__(self) -> None:
            self.outcomes: Counter[str] = Counter()

        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            seen: Counter[object] = Counter()
            cases = []
            for item in items:
                test = item.parent, item.originalname
                cases.append((seen[test], item))
                seen[test] += 1
            items[:] = [item for _, item in sorted(cases, key=lambda case: case[0])]

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                part.add("failures", test=report.nodeid, message=report.longreprtext)
                part.problem(f"{report.nodeid} failed")
            if report.when == "call" or report.outcome != "passed":
                self.outcomes[report.outcome] += 1

        def pytest_runtest_logfinish(self) -> None:
            if device.is_late:
                pytest.exit("the time was over", 0)

    results = Results()
    options = f"-q -rN -m device -p no:cacheprovider -c {ROOT / 'pyproject.toml'}"
    pytest.main([*options.split(), str(SUITE)], plugins=[results])
    part.add("tests", **results.outcomes)
    if device.is_late:
        part.note("tests were cut short")


def prompt_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of the prompts of a real pair."""
    return [encode(tokenizer, prompt).token_ids for prompt in PROMPTS]


def speed(device: Device, part: Part) -> LanguageModel:
    """Measure every method of the real pair, and name its kernels; returns the pair."""
    model = device.load_model()
    methods = supported_methods(model.backend)
    for row in method_rows(model, methods, prompt_ids(model.tokenizer), device.args.max_tokens):
        part.add("methods", **row)
    add_kernels(part, device_report(model.backend))
    return model


def add_kernels(part: Part, report: DeviceReport) -> None:
    """Add the verdicts on kernels, what compilers say, and which kernels do not run."""
    for kernel, verdicts in report.kernels.items():
        for size, verdict in verdicts.items():
            part.add("verdicts", kernel=kernel, size=size, verdict=verdict)
    for kernel, message in report.messages.items():
        part.add("messages", kernel=kernel, message=message)
    for line in kernel_problems(report):
        part.problem(line)


def kernel_problems(report: DeviceReport) -> Iterator[str]:
    """Yield a line for each kernel that is wrong or does not compile; a slower one is right."""
    for kernel, verdicts in report.kernels.items():
        for size, verdict in verdicts.items():
            is_right = verdict.startswith("used") or "times as fast" in verdict
            if not is_right or "; not with " in verdict:
                yield f"{kernel}, {size}: {verdict}"


def peer(device: Device, part: Part) -> None:
    """Measure `generate` of the framework's own package with the weights of the real target."""
    pair = device.locate()
    tokenizer = Tokenizer.from_folder(pair.target, thinking=pair.thinking)
    name = BASELINES[device.backend]
    (system,) = [x for x in SYSTEMS if x.name == name]
    # Weights of few bits, which treeflash may keep, are none for another package.
    setup = setup_of(device.args, resolve_target(device.args.target), tokenizer)
    first, *rest = prompt_ids(tokenizer)
    request = {"method": "generate", "budget": None, "max_tokens": device.args.max_tokens}
    with closing(Peer(system, setup, os.cpu_count() or 1)) as worker:
        _, *answers = [worker.ask(request | {"prompts": [x]}) for x in (first, first, *rest)]
    speed = sum(map(new_tokens, answers)) / sum(map(decode_seconds, answers))
    part.add("methods", system=name, method="generate", tokens_per_s=speed)


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
) -> Iterator[Row]:
    """Measure methods, plain decoding first, which take turns; the first prompt warms up.

    `equal` counts the texts of plain decoding, and `equal_up_to` is the first token that differs in
    any text. In half precision without exact mode, two tokens of nearly equal probability can swap.
    """
    texts: dict[Method, list[Text]] = {method: [] for method in methods}
    for prompt, method in product([prompts[0], *prompts], methods):
        texts[method].append(decode(model, prompt, Case(method, AUTO, None), max_tokens=max_tokens))
    plain = texts[methods[0]][1:]
    for method, (_, *found) in texts.items():
        pairs = [
            (x.generation.token_ids, y.generation.token_ids)
            for x, y in zip(plain, found, strict=True)
        ]
        yield {
            "system": "treeflash",
            "method": method,
            **figures(found, plain),
            "paused": sum(text.generation.paused_iterations for text in found),
            "prompts": len(found),
            "equal": sum(x == y for x, y in pairs),
            "equal_up_to": min(first_difference(*pair) for pair in pairs),
        }


def random_tree(backend: Backend, nodes: int) -> DraftTree:
    """Build a deep and branching tree."""
    from treeflash.testing.comparisons import random_tree  # in `tests`, pytest must import it first

    return random_tree(np.random.default_rng(nodes), 0, nodes, backend.vocab_size)


def verify_rows(
    backend: Backend, context: int, sizes: Sequence[int], repeats: int
) -> Iterator[Row]:
    """Measure the target's forward pass over random trees after committed positions."""
    trees = [random_tree(backend, size) for size in sizes]
    with SequenceSession(backend, capacity=context + max(sizes)) as session:
        session.extend(random_prompt(backend.vocab_size, context))
        calls = [partial(session.verify, tree) for tree in trees]
        for size, ms in zip(sizes, alternate_ms(calls, repeats), strict=True):
            yield {"context": context, "nodes": size, "verify_ms": ms}
