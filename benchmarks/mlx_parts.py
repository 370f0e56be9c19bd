"""The parts of the report about a Mac: passes, command buffers, the host's time, and kernels."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np

from benchmarks.common import (
    Row,
    describe,
    first_difference,
    random_prompt,
    random_tree,
    supported_methods,
)
from benchmarks.device_parts import (
    PROMPTS,
    Device,
    Find,
    exact,
    peer,
    prompt_ids,
    run_command,
    speed,
    tests,
    verify_rows,
)
from benchmarks.report import Part
from treeflash.config import GIB, LoadConfig, Method
from treeflash.decoding.interfaces import DeviceReport, device_report
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.language_model import LanguageModel
from treeflash.registry import examine_device

PLAIN_CONTEXTS, PLAIN_TOKENS = (64, 8192), 32
AHEAD_AFTER = 2
"""Tokens of plain decoding before the first whose pass was submitted ahead."""
BUFFERS = {
    "chosen by MLX": {},
    "larger": {"MLX_MAX_OPS_PER_BUFFER": "200", "MLX_MAX_MB_PER_BUFFER": "400"},
}
"""Sizes of command buffers, as variables of the environment. MLX ends a buffer after 20 to 50
operations by the chip, or after 40 to 50 million elements."""
HOST_NODES, HOST_CONTEXT = (1, 8, 16), 64
"""Nodes and committed positions of the passes whose building is timed."""
PROMPT_LENGTHS, PROMPT_ROUNDS = (2048, 8192), 2
T = TypeVar("T")


class Mac(Device):
    """A Mac's GPU; for tests also a processor."""

    backend = "mlx"


def machine(mac: Mac, part: Part) -> None:
    """Find the chip, its memory, and what makes it slower: the energy mode, and heat."""
    from treeflash_mlx.device import device_facts

    for name, fact in device_facts().items():
        part.add("device", name=name, fact=fact)
    run_command(part, "power", "pmset", "-g")
    run_command(part, "power", "pmset", "-g", "therm")


def speed_and_kernels(mac: Mac, part: Part) -> None:
    """Measure every method, four texts at once, what passes cost, and the layers' own kernels."""
    model = speed(mac, part)
    add_kernels(part, device_report(model.backend))
    prompts, methods = prompt_ids(model.tokenizer), supported_methods(model.backend)
    budget = model.adaptive_budgets.get(methods[-1], model.backend)
    for nodes, seconds in budget.costs.seconds.items():
        part.add("costs", nodes=nodes, pass_ms=1000 * seconds)
    for method in (methods[0], methods[min(3, len(methods) - 1)]):
        part.add("together", **together_row(model, method, prompts, mac.args.max_tokens))


def together_row(
    model: LanguageModel, method: Method, prompts: Sequence[list[int]], max_tokens: int
) -> Row:
    """Measure texts that are decoded at once, and compare them with each alone."""
    texts = [*prompts, prompts[0]]
    alone = [model.generate(prompt, method=method, max_tokens=max_tokens) for prompt in texts]
    started = time.perf_counter()
    together = model.generate_many(texts, parallel=len(texts), method=method, max_tokens=max_tokens)
    found = dict(together)
    seconds = time.perf_counter() - started
    pairs = [(x.token_ids, found[i].token_ids) for i, x in enumerate(alone)]
    return {
        "method": method,
        "texts": len(texts),
        "tokens_per_s": sum(len(x.token_ids) for x in found.values()) / seconds,
        "equal_up_to": min(first_difference(*pair) for pair in pairs),
    }


def passes(mac: Mac, part: Part) -> None:
    """Measure the target's pass by nodes and committed positions."""
    backend = mac.load_model().backend
    part.add("pair", **describe(backend))
    report = device_report(backend)
    add_kernels(part, report)
    room = backend.max_positions - max(mac.args.sizes)
    for context in [x for x in mac.args.contexts if x <= room]:
        needed = backend.state_nbytes(context + max(mac.args.sizes), drafts=False)
        if report.free_bytes is not None and needed > report.free_bytes:
            gib = f"{needed / GIB:.1f} GiB, and the models leave {report.free_bytes / GIB:.1f}"
            part.note(f"passes after {context} positions were left out: their keys take {gib}")
            continue
        for row in verify_rows(backend, [context], mac.args.sizes, mac.args.repeats):
            part.add("passes", **row)
        if mac.is_late:
            part.note(f"passes were cut short after {context} positions")
            return


def prompts(mac: Mac, part: Part) -> None:
    """Measure a prompt with and without the CPU's share of its products; they take turns."""
    backend = mac.load_model().backend
    for length in [x for x in PROMPT_LENGTHS if x < backend.max_positions]:
        for row in prompt_rows(backend, length):
            part.add("prompts", **row)


def prompt_rows(backend: Any, length: int) -> list[Row]:
    """Measure how long it takes until the first token is known; the first call warms up."""
    from treeflash_mlx import shared_products

    ids = random_prompt(backend.vocab_size, length)
    seconds: dict[str, list[float]] = {"shared where it wins": [], "GPU alone": []}
    for _ in range(PROMPT_ROUNDS + 1):
        for name, times in seconds.items():
            least = 1 << 30 if name == "GPU alone" else shared_products.LEAST_ROWS
            with (
                patch.object(shared_products, "LEAST_ROWS", least),
                SequenceSession(backend, capacity=length + 1) as sequence,
            ):
                started = time.perf_counter()
                sequence.extend(ids)
                times.append(time.perf_counter() - started)
    return [
        {"tokens": length, "products": name, "tokens_per_s": length / min(times[1:])}
        for name, times in seconds.items()
    ]


def host(mac: Mac, part: Part) -> None:
    """Measure how long Python builds a pass over a token and over trees, and a commit."""
    backend = mac.load_model().backend
    for nodes in HOST_NODES:
        part.add("host", **host_row(backend, nodes, mac.args.repeats))


def host_row(backend: Any, nodes: int, repeats: int) -> Row:
    """Measure how long a pass takes to build without its evaluation, and a commit after one."""
    import mlx.core as mx
    from treeflash_mlx.attention import TreePass

    target, tree = backend.target, random_tree(backend.vocab_size, nodes)
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
    return {"layers": len(target.layers), "nodes": nodes, **times}


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


def add_kernels(part: Part, report: DeviceReport) -> None:
    """Add the verdicts on kernels, what compilers say, and which kernels are wrong."""
    for kernel, verdicts in report.kernels.items():
        for size, verdict in verdicts.items():
            part.add("verdicts", kernel=kernel, size=size, verdict=verdict)
    for kernel, message in report.messages.items():
        part.add("messages", kernel=kernel, message=message)
    for line in kernel_problems(report.kernels):
        part.problem(line)


def kernel_problems(kernels: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Yield a line for each kernel that is wrong or does not compile; one may be slower than MLX.

    Args:
        kernels: verdicts; see `treeflash.decoding.interfaces.DeviceReport`.
    """
    for kernel, verdicts in kernels.items():
        for size, verdict in verdicts.items():
            left_out = "; not with " in verdict
            if left_out or (verdict.startswith("not used") and "times as fast" not in verdict):
                yield f"{kernel}, {size}: {verdict}"


def kernels(mac: Mac, part: Part) -> None:
    """Check every kernel on shapes of common models."""
    report = examine_device("mlx", LoadConfig(device=mac.args.device))
    add_kernels(part, report)
    if not report.kernels:
        part.note("treeflash's kernels are not tried on this device")


def memory(mac: Mac, part: Part) -> None:
    """Tell the peak of memory of a text, and swap, pressure and heat after the other parts."""
    import mlx.core as mx

    mac.load_model().generate(PROMPTS[0], max_tokens=mac.args.max_tokens)
    part.add("peak", gib=mx.get_peak_memory() / GIB)
    machine(mac, part)


PARTS: dict[str, Find] = {
    "machine": machine,
    "peer": peer,
    "speed": speed_and_kernels,
    "peer again": peer,
    "exact": exact,
    "prompts": prompts,
    "passes": passes,
    "host": host,
    "buffers": buffers,
    "memory": memory,
    "kernels": kernels,
    "tests": tests,
}
"""The parts in their order."""
DEVICE = Mac
