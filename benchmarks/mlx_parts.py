"""The parts of the report about a Mac: passes, command buffers, the host's time, and kernels."""

from __future__ import annotations

import os
import time
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks import device_parts
from benchmarks.common import (
    alternate_ms,
    describe,
    first_difference,
    random_prompt,
    supported_methods,
)
from benchmarks.device_parts import Device, Find
from benchmarks.report import Part
from treeflash.config import GIB, LoadConfig
from treeflash.decoding.interfaces import device_report
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.registry import examine_device

PLAIN_CONTEXTS, PLAIN_TOKENS = (64, 8192), 32
AHEAD_AFTER = 2
"""Tokens of plain decoding before the first whose pass was submitted ahead."""
LARGER = {"MLX_MAX_OPS_PER_BUFFER": "200", "MLX_MAX_MB_PER_BUFFER": "400"}
"""Larger command buffers, as variables of the environment. MLX ends a buffer after 20 to 50
operations by the chip, or after 40 to 50 million elements."""
HOST_NODES, HOST_CONTEXT = (1, 8, 16), 64
"""Nodes and committed positions of the passes whose building is timed."""
PROMPT_LENGTHS, PROMPT_ROUNDS = (2048, 8192), 2


class Mac(Device):
    """A Mac's GPU; for tests also a processor."""

    backend = "mlx"


def machine(mac: Mac, part: Part) -> None:
    """Find the chip, its memory, and what makes it slower: the energy mode, and heat."""
    from treeflash_mlx.device import device_facts

    for name, fact in device_facts().items():
        part.add("device", name=name, fact=fact)
    device_parts.run_command(part, "power", "pmset", "-g")
    device_parts.run_command(part, "power", "pmset", "-g", "therm")


def speed_together(mac: Mac, part: Part) -> None:
    """Measure every method, what passes cost, and four texts at once, beside each alone."""
    model = device_parts.speed(mac, part)
    methods = supported_methods(model.backend)
    budget = model.adaptive_budgets.get(methods[-1], model.backend)
    for nodes, seconds in budget.costs.seconds.items():
        part.add("costs", nodes=nodes, pass_ms=1000 * seconds)
    first, *others = device_parts.prompt_ids(model.tokenizer)
    texts = [first, *others, first]
    for method in (methods[0], methods[min(3, len(methods) - 1)]):
        options: Any = {"method": method, "max_tokens": mac.args.max_tokens}
        alone = [model.generate(text, **options).token_ids for text in texts]
        started = time.perf_counter()
        found = dict(model.generate_many(texts, parallel=len(texts), **options))
        seconds = time.perf_counter() - started
        together = [found[number].token_ids for number in range(len(texts))]
        part.add(
            "together",
            method=method,
            texts=len(texts),
            tokens_per_s=sum(map(len, together)) / seconds,
            equal_up_to=min(map(first_difference, alone, together)),
        )


def passes(mac: Mac, part: Part) -> None:
    """Measure the target's pass by nodes and committed positions."""
    backend = mac.load_model().backend
    part.add("pair", **describe(backend))
    report = device_report(backend)
    device_parts.add_kernels(part, report)
    room = backend.max_positions - max(mac.args.sizes)
    for context in [x for x in mac.args.contexts if x <= room]:
        needed = backend.state_nbytes(context + max(mac.args.sizes), drafts=False)
        if report.free_bytes is not None and needed > report.free_bytes:
            gib = f"{needed / GIB:.1f} GiB, and the models leave {report.free_bytes / GIB:.1f}"
            part.note(f"passes after {context} positions were left out: their keys take {gib}")
            continue
        for row in device_parts.verify_rows(backend, context, mac.args.sizes, mac.args.repeats):
            part.add("passes", **row)
        if mac.is_late:
            part.note(f"passes were cut short after {context} positions")
            return


def prompts(mac: Mac, part: Part) -> None:
    """Measure the time to the first token, with the CPU's share of products and without."""
    from treeflash_mlx import shared_products

    backend = mac.load_model().backend
    ways = {"shared where it wins": shared_products.LEAST_ROWS, "GPU alone": 1 << 30}
    for length in [x for x in PROMPT_LENGTHS if x < backend.max_positions]:
        ids = random_prompt(backend.vocab_size, length)
        calls = [partial(run_prompt, backend, ids, least) for least in ways.values()]
        for name, ms in zip(ways, alternate_ms(calls, PROMPT_ROUNDS), strict=True):
            part.add("prompts", tokens=length, products=name, tokens_per_s=1000 * length / ms)


def run_prompt(backend: Any, ids: list[int], least_rows: int) -> None:
    """Run a prompt whose products are shared with the CPU from some rows on."""
    from treeflash_mlx import shared_products

    with (
        patch.object(shared_products, "LEAST_ROWS", least_rows),
        SequenceSession(backend, capacity=len(ids) + 1) as sequence,
    ):
        sequence.extend(ids)


def host(mac: Mac, part: Part) -> None:
    """Measure how long a pass takes to build without its evaluation, and a commit after one."""
    import mlx.core as mx
    from treeflash_mlx.attention import TreePass

    backend: Any = mac.load_model().backend
    target, repeats = backend.target, mac.args.repeats
    for nodes in HOST_NODES:
        tree = device_parts.random_tree(backend, nodes)
        path = np.flatnonzero(tree.ancestor_mask()[-1]).astype(np.int32)
        builds, commits = [], []
        capacity = HOST_CONTEXT + (repeats + 1) * len(path) + nodes
        with SequenceSession(backend, capacity=capacity) as session:
            session.extend(random_prompt(backend.vocab_size, HOST_CONTEXT))
            state: Any = session.state
            cache = state.kv_cache
            for _ in range(repeats + 1):
                storage, length = cache.storage, session.length
                started = time.perf_counter()
                made = TreePass.build([tree], [length], storage.columns - 1, solve=target.solve)
                output = target.forward(mx.array(tree.tokens)[None], [cache], (), made)
                builds.append(1000 * (time.perf_counter() - started))
                mx.eval(output)
                session.verify(tree)
                started = time.perf_counter()
                session.commit(path)
                commits.append(1000 * (time.perf_counter() - started))
                mx.synchronize()
        times = {"build_ms": median(builds[1:]), "commit_ms": median(commits[1:])}
        part.add("host", layers=len(target.layers), nodes=nodes, **times)


def larger_buffers(mac: Mac, part: Part) -> None:
    """Measure plain decoding with larger command buffers, in the process that reads the sizes."""
    with patch.dict(os.environ, LARGER):
        plain(mac, part)


def plain(mac: Mac, part: Part) -> None:
    """Measure plain decoding after short and long texts, with the next pass submitted ahead."""
    backend: Any = mac.load_model().backend
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
        part.add("plain", context=length, token_ms=median(times[AHEAD_AFTER:]))


def kernels(mac: Mac, part: Part) -> None:
    """Check every kernel on shapes of common models."""
    report = examine_device("mlx", LoadConfig(device=mac.args.device))
    device_parts.add_kernels(part, report)
    if not report.kernels:
        part.note("treeflash's kernels are not tried on this device")


def memory(mac: Mac, part: Part) -> None:
    """Tell the peak of memory of a text, and swap, pressure and heat after the other parts."""
    import mlx.core as mx

    mac.load_model().generate(device_parts.PROMPTS[0], max_tokens=mac.args.max_tokens)
    part.add("peak", gib=mx.get_peak_memory() / GIB)
    machine(mac, part)


PARTS: dict[str, Find] = {
    "machine": machine,
    "peer": device_parts.peer,
    "speed": speed_together,
    "peer again": device_parts.peer,
    "exact": device_parts.exact,
    "prompts": prompts,
    "passes": passes,
    "host": host,
    "plain": plain,
    "larger buffers": larger_buffers,
    "memory": memory,
    "kernels": kernels,
    "tests": device_parts.tests,
}
"""The parts in their order."""
DEVICE = Mac
