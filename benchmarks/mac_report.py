"""Whether treeflash runs on this Mac as it should, and how fast: one command, one file to send.

    python -m benchmarks.mac_report --json report.json
    python -m benchmarks.mac_report --json report.json --target mlx-community/Qwen3-4B-4bit

It ends with the list of problems that it found. Its exit status is 0 if there are none, and 1 if
there are some.

- `kernels`: whether each kernel is right on this GPU, and how fast beside MLX's operations.
- `texts`: whether every method writes the text of plain decoding, with tiny models of random
  weights in float32, and in bfloat16 with exact mode; or why that is refused.
- `mlx-lm`: tokens per second of mlx-lm's own loop with the target's weights.
- `buffers`: plain decoding after a short and a long text, with as many operations in a command
  buffer as MLX chooses, and with more. MLX may then copy the keys of a long text for every token,
  or wait less; nobody knows.
- `passes`: a target forward pass over a tree, by nodes and committed positions. The steps by nodes
  show which kernels the GPU chooses, the growth by positions the cost of attention.
- `host`: the time in which Python builds a pass over one token, which MLX evaluates afterwards.
- `speed`: for every method with the budget `auto`, tokens per second, tokens per forward pass, and
  the mean time of an iteration by phase. Work that a phase leaves running on the device counts
  towards the next phase that waits for it.
- `memory`: the peak of a text, and what the device tells at the end.

The tiny models come from the conformance suite: `pip install '.[mlx,testing]'`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np

from benchmarks.common import (
    Parser,
    Row,
    describe,
    random_prompt,
    require_testing,
    supported_methods,
)
from benchmarks.decoding.iteration import verify_rows
from benchmarks.gpu_report import compare_texts
from benchmarks.peers.system import SYSTEMS, Peer
from benchmarks.report import Part, Report
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model, locate_model
from treeflash.config import GIB, LoadConfig, Method
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash.language_model import LanguageModel
from treeflash.registry import examine_device, loader
from treeflash.text.generation import PHASES, Generation, mean
from treeflash.text.prompt import encode
from treeflash.text.tokenizer import Tokenizer

MLX_LM = next(system for system in SYSTEMS if system.name == "mlx-lm")
PLAIN_CONTEXTS, PLAIN_TOKENS = (64, 8192), 32
AHEAD_AFTER = 2
"""Tokens of plain decoding before the first whose pass was submitted ahead."""
PROMPTS = (
    "Natalia sold clips to 48 of her friends in April, and half as many in May. How many clips did "
    "she sell in both months? Reason step by step.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "Why is the sky blue? Answer in one paragraph.",
)
OPERATIONS = (None, 200)
"""Numbers of operations in a command buffer; MLX chooses 20 to 50 by the chip."""
T = TypeVar("T")


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    sizes = [1, 2, 4, 5, 8, 10, 12, 16, 24, 32, 48, 64]
    options.add_numbers("--sizes", sizes, "nodes of the trees of `passes`")
    options.add_numbers("--contexts", [64, 1024, 4096], "committed positions")
    options.add_number("--repeats", 10, "calls per median")
    options.add_number("--max-tokens", 128, "new tokens per prompt")
    options.add_number("--minutes", 20, "time for all parts")
    add_model_options(options)
    options.set_defaults(backend="mlx")
    return options


def kernel_problems(kernels: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Yield a line for each kernel that is wrong or does not compile; one may be slower than MLX.

    Args:
        kernels: verdicts; see `treeflash.decoding.interfaces.DeviceReport`.
    """
    for kernel, verdicts in kernels.items():
        for size, verdict in verdicts.items():
            if verdict.startswith("not used") and "times as fast" not in verdict:
                yield f"{kernel}, {size}: {verdict}"


def kernels(args: Any, part: Part) -> None:
    """Check every kernel on shapes of common models."""
    found = examine_device("mlx", LoadConfig(device=args.device)).kernels
    for kernel, verdicts in found.items():
        for size, verdict in verdicts.items():
            part.add("verdicts", kernel=kernel, size=size, verdict=verdict)
    if not found:
        part.note("treeflash's kernels are not tried on this device")
    for line in kernel_problems(found):
        part.problem(line)


def texts(args: Any, part: Part) -> None:
    """Compare the texts of all methods with plain decoding's."""
    from treeflash.testing.models import write_pair

    with tempfile.TemporaryDirectory() as folder:
        pair = write_pair(Path(folder), "qwen3", vocab_size=500, hidden_size=64)
        for dtype, exact in (("float32", None), ("bfloat16", True)):
            config = LoadConfig(device=args.device, dtype=dtype, exact=exact)
            try:
                backend = loader("mlx")(*pair, config)
            except UnsupportedModelError as error:
                part.note(f"{dtype}: {error}")
                continue
            compare_texts(part, backend, dtype)


def host_row(backend: Any, repeats: int) -> Row:
    """Measure how long a pass over a single token takes to build, without its evaluation."""
    import mlx.core as mx

    target = backend.target
    cache = target.new_kv_cache(repeats + 64)
    token = mx.array([[1]], mx.int32)
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        output = target.forward(token, [cache], ())
        times.append(1000 * (time.perf_counter() - started))
        mx.eval(output)
    return {"layers": len(target.layers), "host_ms": median(times[1:])}


def plain_rows(backend: Any) -> list[Row]:
    """Measure plain decoding after short and long texts, with the next pass submitted ahead."""
    rows = []
    for context in PLAIN_CONTEXTS:
        length = min(context, backend.max_positions - AHEAD_AFTER - PLAIN_TOKENS)
        capacity, times = length + AHEAD_AFTER + PLAIN_TOKENS, []
        with SequenceSession(backend, capacity=capacity) as sequence:
            root = sequence.extend(random_prompt(backend.vocab_size, length))
            for _ in range(AHEAD_AFTER + PLAIN_TOKENS):
                started = time.perf_counter()
                root = int(sequence.verify(DraftTree.root_only(root))[0])
                sequence.commit(np.zeros(1, np.int32))
                times.append(1000 * (time.perf_counter() - started))
        rows.append({"context": length, "token_ms": median(times[AHEAD_AFTER:])})
    return rows


def method_rows(
    model: LanguageModel, methods: Sequence[Method], prompts: Sequence[list[int]], max_tokens: int
) -> Iterator[Row]:
    """Measure the speed of methods, which take turns, and their mean times of an iteration."""
    generations: dict[Method, list[Generation]] = {method: [] for method in methods}
    seconds = dict.fromkeys(methods, 0.0)
    for number, (prompt, method) in enumerate(product([prompts[0], *prompts], methods)):
        started = time.perf_counter()
        generation = model.generate(prompt, method=method, max_tokens=max_tokens)
        if number >= len(methods):  # the first prompt warms up
            seconds[method] += time.perf_counter() - started
            generations[method].append(generation)
    for method, found in generations.items():
        lengths = [n for generation in found for n in generation.accepted_lengths]
        tokens = sum(len(generation.token_ids) for generation in found)
        yield {
            "system": "treeflash",
            "method": method,
            "tokens_per_s": tokens / seconds[method],
            "block_efficiency": mean(lengths),
        } | {
            f"{phase}_ms": 1000 * sum(g.seconds[phase] for g in found) / max(1, len(lengths))
            for phase in PHASES[1:]
        }


def mlx_lm_row(args: Any) -> Row:
    """Measure the speed of mlx-lm's own loop, in the process of its worker."""
    from treeflash_mlx.device import choose_device

    pair, on_cpu = locate_model(args), choose_device(args.device)
    tokenizer = Tokenizer.from_folder(pair.target, thinking=pair.thinking)
    setup = {
        "target": str(pair.target),
        "assistant": None,
        "device": "cpu" if on_cpu else "gpu",
        "dtype": args.dtype or ("float32" if on_cpu else None),
        "stop_token_ids": sorted(tokenizer.stop_token_ids),
    }
    request = {"method": "generate", "budget": None, "max_tokens": args.max_tokens}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(MLX_LM.worker)]
        peer = Peer(MLX_LM, command, setup, os.cpu_count() or 1, Path(folder) / "log")
        try:
            tokens, started = 0, 0.0
            for number, prompt in enumerate([PROMPTS[0], *PROMPTS]):
                if number == 1:  # the first prompt warms up
                    tokens, started = 0, time.perf_counter()
                ids = encode(tokenizer, prompt).token_ids
                tokens += len(peer.ask(request | {"prompt_ids": ids})["token_ids"])
            seconds = time.perf_counter() - started
        finally:
            peer.close()
    return {"system": "mlx-lm", "method": "generate", "tokens_per_s": tokens / seconds}


def mlx_lm(args: Any, part: Part) -> None:
    """Measure mlx-lm's own loop over the same weights."""
    part.add("methods", **mlx_lm_row(args))


def buffers(args: Any, part: Part) -> None:
    """Measure plain decoding with other numbers of operations in a command buffer."""
    for operations in OPERATIONS:
        environment = {} if operations is None else {"MLX_MAX_OPS_PER_BUFFER": str(operations)}
        for row in in_process(plain, args, environment=environment):
            part.add("plain", operations=operations or "chosen by MLX", **row)


def plain(args: Any) -> list[Row]:
    """Load the target, and measure plain decoding."""
    return plain_rows(load_model(args).backend)


def in_process(function: Callable[..., T], *arguments: Any, environment: Mapping[str, str]) -> T:
    """Call a function in a separate process, with more variables in its environment."""
    context = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, environment), ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def passes(args: Any, part: Part) -> None:
    """Measure the target's pass by nodes and committed positions."""
    backend = load_model(args).backend
    part.add("pair", **describe(backend))
    for context in args.contexts:
        for row in verify_rows(backend, [context], args.sizes, args.repeats):
            part.add("passes", **row)


def host(args: Any, part: Part) -> None:
    """Measure how long a pass takes to build."""
    part.add("host", **host_row(load_model(args).backend, args.repeats))


def speed(args: Any, part: Part) -> None:
    """Measure every method that the pair supports."""
    model = load_model(args)
    prompts = [encode(model.tokenizer, prompt).token_ids for prompt in PROMPTS]
    for row in method_rows(model, supported_methods(model.backend), prompts, args.max_tokens):
        part.add("methods", **row)


def memory(args: Any, part: Part) -> None:
    """Tell the peak of memory of a text, and swap and pressure after the other parts."""
    import mlx.core as mx
    from treeflash_mlx.device import device_facts

    load_model(args).generate(PROMPTS[0], max_tokens=args.max_tokens)
    part.add("peak", gib=mx.get_peak_memory() / GIB)
    for name, fact in device_facts().items():
        part.add("device", name=name, fact=fact)


PARTS: dict[str, Callable[[Any, Part], None]] = {
    "kernels": kernels,
    "texts": texts,
    "mlx-lm": mlx_lm,
    "buffers": buffers,
    "passes": passes,
    "host": host,
    "speed": speed,
    "memory": memory,
}


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts, print, write."""
    args = parser().parse_args(argv)
    if args.backend != "mlx":
        raise ConfigError(f"this report is about the mlx backend, got --backend {args.backend}")
    loader("mlx")  # its error is clearer than an import's
    require_testing("mlx")
    from treeflash_mlx.device import choose_device, device_facts

    choose_device(args.device)
    report = Report("mac_report", args.json, dict(device_facts()), 60 * args.minutes)
    for name, find in PARTS.items():
        report.run(name, partial(find, args))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
