"""The parts of the report about a Mac: passes, command buffers, the host's time, and kernels."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np

from benchmarks.common import Row, describe, random_prompt
from benchmarks.decoding.iteration import verify_rows
from benchmarks.device_parts import (
    PROMPTS,
    Device,
    Find,
    exact,
    peer_row,
    prompt_ids,
    run_command,
    speed,
    tiny_texts,
)
from benchmarks.report import Part
from treeflash.config import GIB, LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.registry import examine_device
from treeflash.text.tokenizer import Tokenizer

PLAIN_CONTEXTS, PLAIN_TOKENS = (64, 8192), 32
AHEAD_AFTER = 2
"""Tokens of plain decoding before the first whose pass was submitted ahead."""
BUFFERS = {
    "chosen by MLX": {},
    "larger": {"MLX_MAX_OPS_PER_BUFFER": "200", "MLX_MAX_MB_PER_BUFFER": "400"},
}
"""Sizes of command buffers, as variables of the environment. MLX ends a buffer after 20 to 50
operations by the chip, or after 40 to 50 million elements."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("qwen3", {"dtype": "float32"}),
    "float32, gated delta nets": ("qwen3_5", {"dtype": "float32"}),
    "exact bfloat16": ("qwen3", {"dtype": "bfloat16", "exact": True}),
}
"""Families of tiny targets, and settings."""
T = TypeVar("T")


class Mac(Device):
    """A Mac's GPU; for tests also a processor."""

    backend = "mlx"
    hidden_size = 64  # of which quantised keys have groups


def machine(mac: Mac, part: Part) -> None:
    """Find the chip, its memory, and what makes it slower: the energy mode, and heat."""
    from treeflash_mlx.device import device_facts

    for name, fact in device_facts().items():
        part.add("device", name=name, fact=fact)
    run_command(part, "power", "pmset", "-g")
    run_command(part, "power", "pmset", "-g", "therm")


def peer(mac: Mac, part: Part) -> None:
    """Measure mlx-lm's own loop with the weights of the real target."""
    import mlx.core as mx
    from mlx_lm import load, stream_generate
    from treeflash_mlx.device import choose_device

    pair, on_cpu = mac.locate(), choose_device(mac.args.device)
    own = Tokenizer.from_folder(pair.target, thinking=pair.thinking)
    model, tokenizer = load(str(pair.target))[:2]
    tokenizer.eos_token_ids = sorted(own.stop_token_ids)
    if (dtype := mac.args.dtype or ("float32" if on_cpu else None)) is not None:
        model.set_dtype(getattr(mx, dtype))  # else as in the files

    def generate(ids: list[int]) -> list[int]:
        parts = stream_generate(model, tokenizer, ids, max_tokens=mac.args.max_tokens)
        return [each.token for each in parts]

    part.add("methods", **peer_row("mlx-lm", generate, prompt_ids(own)))


def passes(mac: Mac, part: Part) -> None:
    """Measure the target's pass by nodes and committed positions."""
    backend = mac.load_model().backend
    part.add("pair", **describe(backend))
    room = backend.max_positions - max(mac.args.sizes)
    for context in [x for x in mac.args.contexts if x <= room]:
        for row in verify_rows(backend, [context], mac.args.sizes, mac.args.repeats):
            part.add("passes", **row)
        if mac.is_late:
            part.note(f"passes were cut short after {context} positions")
            return


def host(mac: Mac, part: Part) -> None:
    """Measure how long a pass takes to build."""
    part.add("host", **host_row(mac.load_model().backend, mac.args.repeats))


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


def buffers(mac: Mac, part: Part) -> None:
    """Measure plain decoding with command buffers of other sizes."""
    for size, environment in BUFFERS.items():
        for row in in_process(plain, mac, environment=environment):
            part.add("plain", buffers=size, **row)


def plain(mac: Mac) -> list[Row]:
    """Load the target, and measure plain decoding."""
    return plain_rows(mac.load_model().backend)


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


def in_process(function: Callable[..., T], *arguments: Any, environment: Mapping[str, str]) -> T:
    """Call a function in a separate process, with more variables in its environment."""
    context = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, environment), ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def texts(mac: Mac, part: Part) -> None:
    """Compare the texts of all methods with plain decoding's."""
    tiny_texts(mac, part, VARIANTS, refused=part.note)


def kernel_problems(kernels: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Yield a line for each kernel that is wrong or does not compile; one may be slower than MLX.

    Args:
        kernels: verdicts; see `treeflash.decoding.interfaces.DeviceReport`.
    """
    for kernel, verdicts in kernels.items():
        for size, verdict in verdicts.items():
            if verdict.startswith("not used") and "times as fast" not in verdict:
                yield f"{kernel}, {size}: {verdict}"


def kernels(mac: Mac, part: Part) -> None:
    """Check every kernel on shapes of common models."""
    found = examine_device("mlx", LoadConfig(device=mac.args.device)).kernels
    for kernel, verdicts in found.items():
        for size, verdict in verdicts.items():
            part.add("verdicts", kernel=kernel, size=size, verdict=verdict)
    if not found:
        part.note("treeflash's kernels are not tried on this device")
    for line in kernel_problems(found):
        part.problem(line)


def memory(mac: Mac, part: Part) -> None:
    """Tell the peak of memory of a text, and swap, pressure and heat after the other parts."""
    import mlx.core as mx

    mac.load_model().generate(PROMPTS[0], max_tokens=mac.args.max_tokens)
    part.add("peak", gib=mx.get_peak_memory() / GIB)
    machine(mac, part)


PARTS: dict[str, Find] = {
    "machine": machine,
    "peer": peer,
    "speed": speed,
    "peer again": peer,
    "exact": exact,
    "passes": passes,
    "host": host,
    "buffers": buffers,
    "texts": texts,
    "memory": memory,
    "kernels": kernels,
}
"""The parts in their order."""
DEVICE = Mac
