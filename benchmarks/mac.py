"""What MLX does with a target and its drafter: one command, one JSON file.

    python -m benchmarks.mac --target FOLDER_OR_ID [--json FILE]

- `verify`: milliseconds of a target forward pass over a tree, by nodes and committed positions. The
  steps by nodes show which kernels the GPU chooses, the growth by positions the cost of attention.
- `host`: milliseconds in which Python builds a pass over one token, which MLX evaluates afterwards.
- `plain`: milliseconds of a token of plain decoding, after a short and a long text.
- `methods`: for every method with the budget `auto`, tokens per second, tokens per iteration, and
  milliseconds of an iteration by phase; and tokens per second of mlx-lm's own loop with the same
  weights, in a separate process. Work that a phase leaves running on the device counts towards
  the next phase that waits for it.

It runs wherever MLX does.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.common import (
    Parser,
    Row,
    describe,
    random_prompt,
    show,
    supported_methods,
    write_json,
)
from benchmarks.decoding.iteration import verify_rows
from benchmarks.peers.system import SYSTEMS, Peer
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model, locate_model
from treeflash.config import Method
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError
from treeflash.language_model import LanguageModel
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


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    sizes = [1, 2, 4, 5, 8, 10, 12, 16, 24, 32, 48, 64]
    options.add_numbers("--sizes", sizes, "nodes of the trees of `verify`")
    options.add_numbers("--contexts", [64, 1024, 4096], "committed positions")
    options.add_number("--repeats", 10, "calls per median")
    options.add_number("--max-tokens", 128, "new tokens per prompt")
    add_model_options(options)
    options.set_defaults(backend="mlx")
    return options


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


def decode_all(run: Callable[[list[int]], int], prompts: Sequence[list[int]]) -> float:
    """Measure a function from a prompt to its number of new tokens, in tokens per second."""
    run(prompts[0])  # warms up
    started = time.perf_counter()
    tokens = sum(run(prompt) for prompt in prompts)
    return tokens / (time.perf_counter() - started)


def method_row(
    model: LanguageModel, method: Method, prompts: Sequence[list[int]], max_tokens: int
) -> Row:
    """Measure the speed of a method, and its mean time of an iteration by phase."""
    generations: list[Generation] = []

    def run(prompt: list[int]) -> int:
        generations.append(model.generate(prompt, method=method, max_tokens=max_tokens))
        return len(generations[-1].token_ids)

    speed = decode_all(run, prompts)
    measured = generations[1:]  # the first one warms up
    lengths = [n for generation in measured for n in generation.accepted_lengths]
    phases = {
        f"{phase}_ms": 1000 * sum(g.seconds[phase] for g in measured) / max(1, len(lengths))
        for phase in PHASES[1:]
    }
    row = {"system": "treeflash", "method": method, "tokens_per_s": speed}
    return row | {"block_efficiency": mean(lengths)} | phases


def mlx_lm_row(args: Namespace) -> Row:
    """Measure the speed of mlx-lm's own loop over the same weights, in a separate process.

    In this process the model would have hooks, and its weights are not loaded yet.
    """
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
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(MLX_LM.worker)]
        peer = Peer(MLX_LM, command, setup, os.cpu_count() or 1, Path(folder) / "log")
        try:
            speed = decode_all(
                lambda prompt: len(peer.ask(request | {"prompt_ids": prompt})["token_ids"]),
                [encode(tokenizer, prompt).token_ids for prompt in PROMPTS],
            )
        finally:
            peer.close()
    row: Row = {"system": "mlx-lm", "method": "generate", "tokens_per_s": speed}
    return row | dict.fromkeys(["block_efficiency", *(f"{phase}_ms" for phase in PHASES[1:])])


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    if args.backend != "mlx":
        raise ConfigError(f"this benchmark measures the mlx backend, got --backend {args.backend}")
    baseline = mlx_lm_row(args)
    model = load_model(args)
    backend = model.backend
    prompts = [encode(model.tokenizer, prompt).token_ids for prompt in PROMPTS]
    methods = [
        method_row(model, method, prompts, args.max_tokens) for method in supported_methods(backend)
    ]
    results = {
        "verify": verify_rows(backend, args.contexts, args.sizes, args.repeats),
        "host": [host_row(backend, args.repeats)],
        "plain": plain_rows(backend),
        "methods": [*methods, baseline],
    }
    pair = describe(backend) | {"target": args.target}
    show("device and model", [pair])
    for name, rows in results.items():
        show(name, rows)
    write_json(args.json, "mac", pair | {"repeats": args.repeats} | results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
