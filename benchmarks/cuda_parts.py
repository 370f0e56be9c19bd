"""The parts of the report about a GPU: its tools, a real pair, and iterations at full size."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from itertools import product
from statistics import median
from typing import Any
from unittest import mock

from benchmarks import device_parts
from benchmarks.common import Row, alternate_ms, package_versions, random_prompt
from benchmarks.device_parts import Device, Find
from benchmarks.random_pair import SHAPES, load_pair, random_tensor
from benchmarks.report import Part
from treeflash.config import DecodeConfig, LoadConfig, Method, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.decoding.interfaces import Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.session import SequenceSession

OPTIONAL_PACKAGES = (
    *("triton", "accelerate", "flash-linear-attention", "causal-conv1d", "kernels"),
    *("bitsandbytes", "compressed-tensors", "gptqmodel"),
)
VARIABLES = ("CUDA_", "NVIDIA_TF32", "NVIDIA_VISIBLE", "PYTORCH_", "TORCH_", "TRITON_")
"""The beginnings of the names of variables that the machine's part lists. None is a secret, as
`NVIDIA_API_KEY` is."""
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "sampled": SamplingConfig(temperature=0.8, top_p=0.9, seed=1),
}
LARGE = ("qwen3-8b", 60), ("qwen3-4b", 20)
"""Shapes of `iterations`, and the GiB of the GPU that each takes."""
WARM_UP, MEASURED, PROFILED = 8, 16, 10
"""Iterations before the measured ones, these, and the ones of the profile."""
PROMPT_TOKENS = 256
WIDE_TREES, WIDE_NODES, WIDE_CONTEXT = 3, 256, 64
"""Trees that no graph holds together today, their nodes, and committed positions before each."""
TIMED_CALLS = {
    "draft": ("drafter", "draft"),
    "tables": ("head", "transitions"),
    "verify": ("verifier", "run"),
    "commit": ("verifier", "commit"),
}
"""The calls of an iteration that the device's clock measures: a backend's role, and a method."""


def choose_shape(free_memory: int) -> str:
    """Return the largest shape that fits these bytes of the GPU."""
    return next((name for name, gib in LARGE if free_memory > gib << 30), "tiny")


def kernel_rows(averages: Iterable[Any], iterations: int) -> list[Row]:
    """Return what each kernel takes of an iteration, the longest one first.

    Args:
        averages: of a profile of PyTorch. Averages of the host, such as the launch of a graph, have
            the times of their kernels once more.
        iterations: of the profile.
    """
    rows = [
        {
            "kernel": event.key,
            "ms": event.self_device_time_total / 1000 / iterations,  # from microseconds
            "calls": event.count / iterations,
        }
        for event in averages
        if event.device_type.name == "CUDA"
    ]
    return sorted(rows, key=lambda row: -row["ms"])


class Gpu(Device):
    """A GPU that CUDA runs on; for tests also a processor."""

    backend = "cuda"

    @cached_property
    def device(self) -> Any:
        """PyTorch's device."""
        from treeflash_cuda.device import choose_device

        return choose_device(self.args.device)

    def free_bytes(self) -> int:
        """Return the memory that is free; 0 for a processor."""
        import torch

        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0


def machine(gpu: Gpu, part: Part) -> None:
    """Find the device, the driver, the clocks, what Triton needs, and what changes the software."""
    from treeflash_cuda.device import device_facts
    from treeflash_cuda.gpu.compilation import c_compiler, python_header, toolchain_problems

    for name, fact in device_facts(gpu.device).items():
        part.add("device", name=name, fact=fact)
    compiler, header = c_compiler(), python_header()
    part.add("tools", name="C compiler", found=compiler)
    part.add("tools", name="Python.h", found=header.is_file())
    for line in toolchain_problems(compiler, header):
        part.problem(line)
    for name, installed in package_versions(OPTIONAL_PACKAGES).items():
        part.add("packages", name=name, version=installed)
    for name, value in sorted(os.environ.items()):
        if name.startswith(VARIABLES):
            part.add("environment", name=name, value=value)
    facts = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    query = f"--query-gpu={facts},temperature.gpu"
    device_parts.run_command(part, "cards", "nvidia-smi", query, "--format=csv")


def speed(gpu: Gpu, part: Part) -> None:
    """Measure every method of the real pair, and what of it runs without kernels and graphs."""
    backend: Any = device_parts.speed(gpu, part).backend
    graphs = backend.target.graphs
    for name in dict.fromkeys(x.name for x in graphs.tried):
        done = [x.seconds for x in graphs.tried if x.name == name and not x.reason]
        row = {"function": name, "captured": len(done), "replays": graphs.replays[name]}
        part.add("graphs", **row, capture_ms=1000 * median(done or [0]))
    if not graphs.replays["the target"]:
        part.problem("the target never ran from a CUDA graph")


def iterations(gpu: Gpu, part: Part) -> None:
    """Measure passes and iterations of a pair of random weights."""
    shape = gpu.args.shape or choose_shape(gpu.free_bytes())
    dtype = "bfloat16" if gpu.device.type == "cuda" else "float32"
    settings = LoadConfig(device=gpu.args.device, dtype=dtype)
    make = partial(random_tensor, device=gpu.device, dtype=dtype)
    backend = load_pair(SHAPES[shape], settings, make)
    weights = sum(backend.weights_read["a pass reads"].values())
    bandwidth = copy_bandwidth(gpu.device)
    part.add("pair", shape=shape, dtype=dtype, copy_gb_per_s=bandwidth / 1e9)
    for count, (sampling, settings_of_text) in product((1, 8, 32), SAMPLINGS.items()):
        plain_ms = 0.0
        budget = 64 if count == 1 else 16
        cases: tuple[tuple[Method, int], ...] = (("ar", 1), ("treeflash", budget))
        for method, nodes in cases:
            config = DecodeConfig(
                method=method, budget=nodes, max_tokens=400, sampling=settings_of_text
            )
            case = {"texts": count, "method": method, "nodes": nodes, "sampling": sampling}
            row = iteration_row(backend, count, config)
            plain_ms = plain_ms or row["iteration_ms"]
            row["break_even"] = row["iteration_ms"] / plain_ms
            part.add("iterations", **case, **row)
        if gpu.is_late:
            part.note(f"iterations were cut short after {count} texts")
            return
    if gpu.device.type == "cuda":
        for texts, sampling in ((1, "greedy"), (32, "sampled")):
            _profile(part, backend, texts, sampling)
    contexts = [x for x in (64, 1024, 8192, 32_768) if x < backend.max_positions]
    for context in contexts[: 1 if shape == "tiny" else None]:
        for row in device_parts.verify_rows(backend, context, [1, 8, 16, 64], 5):
            nbytes = weights + backend.state_nbytes(context, drafts=False)
            limit = 1000 * nbytes / bandwidth
            part.add("passes", **row, share_of_bandwidth=limit / row["verify_ms"])
        if gpu.is_late:
            part.note(f"passes were cut short after {context} positions")
            return
    for row in wide_rows(backend, 5):
        part.add("wide passes", **row)


def wide_rows(backend: Any, repeats: int) -> list[Row]:
    """Measure more rows than a graph has: in two passes, as they run, and in one larger graph.

    A prompt's chunk beside a full pass of trees is such a case, at each of its chunks.
    """
    from treeflash_cuda.gpu import graphs, row_pass

    rows = WIDE_TREES * WIDE_NODES
    tree = device_parts.random_tree(backend, WIDE_NODES)
    params = SamplingParams.from_positions(SamplingConfig(), tree.positions(WIDE_CONTEXT + 1))
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(SequenceSession(backend, capacity=WIDE_CONTEXT + WIDE_NODES))
            for _ in range(WIDE_TREES)
        ]
        for session in sessions:
            session.extend(random_prompt(backend.vocab_size, WIDE_CONTEXT))
        work = [Verify(session.state, tree, params) for session in sessions]

        def at_once() -> None:
            with (
                mock.patch.object(graphs, "GRAPH_ROWS", (*graphs.GRAPH_ROWS, rows)),
                mock.patch.object(row_pass, "MAX_ROWS", rows),
            ):
                backend.verifier.run(work)

        ms = alternate_ms([partial(backend.verifier.run, work), at_once], repeats)
    names = "today's passes", "one pass"
    return [{"rows": rows, "in": x, "verify_ms": y} for x, y in zip(names, ms, strict=True)]


def synchronize(device: Any) -> None:
    """Wait until the device is idle."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: Any) -> float:
    """Measure the bytes per second of a large copy, read and written."""
    import torch

    source = torch.zeros(
        2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        synchronize(device)

    (ms,) = alternate_ms([copy], 10)
    return 2000 * source.nbytes / ms


def start_texts(backend: Any, texts: int, config: DecodeConfig) -> Scheduler:
    """Submit texts whose prompts run in the first iteration, so that all others decode them all."""
    prompt = random_prompt(backend.vocab_size, PROMPT_TOKENS)
    scheduler = Scheduler(
        backend, SchedulerConfig(max_parallel=texts, lone_prefill_chunk=texts * PROMPT_TOKENS)
    )
    for _ in range(texts):
        scheduler.submit(Request(prompt_ids=prompt, config=config))
    return scheduler


class DeviceClock:
    """Times of a GPU's own clock between the beginnings and ends of the calls of an iteration.

    A host's clock gives the time of work that nobody has waited for to the call that waits.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[str, Any, Any]] = []  # name, event before, event after

    @contextmanager
    def watch(self, backend: Any) -> Iterator[None]:
        """Put events around the calls of a backend."""
        with ExitStack() as patches:
            for name, (role, method) in TIMED_CALLS.items():
                owner = getattr(backend, role)
                timed = partial(self._time, name, getattr(owner, method))
                patches.enter_context(mock.patch.object(owner, method, timed))
            yield

    def _time(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        import torch

        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        result = call(*args)
        last.record()
        self._calls.append((f"{name}_device_ms", first, last))
        return result

    def read(self) -> dict[str, float]:
        """Return the milliseconds of each call since the last time; the device is idle."""
        found: Counter[str] = Counter()
        for name, first, last in self._calls:
            found[name] += first.elapsed_time(last)
        self._calls.clear()
        return dict(found)


def iteration_row(backend: Any, texts: int, config: DecodeConfig) -> Row:
    """Return the median milliseconds of an iteration and its phases, after some to warm up."""
    scheduler, clock = start_texts(backend, texts, config), DeviceClock()
    times: list[float] = []
    phases: dict[str, list[float]] = {}
    is_timed = backend.target.device.type == "cuda"
    with clock.watch(backend) if is_timed else nullcontext():
        for number in range(WARM_UP + MEASURED):
            started = time.perf_counter()
            events = scheduler.step()
            synchronize(backend.target.device)
            ended = time.perf_counter()
            on_device, steps = clock.read(), []
            for _, step in events:
                if isinstance(step, Exception):
                    raise step
                steps.append(step)
            if number < WARM_UP or not steps:
                continue
            times.append(1000 * (ended - started))
            on_host = {f"{x}_ms": 1000 * seconds for x, seconds in steps[0].seconds.items()}
            for phase, ms in (on_host | on_device).items():
                phases.setdefault(phase, []).append(ms)
    scheduler.close()
    row: Row = {"iteration_ms": median(times)}
    return row | {name: median(values) for name, values in phases.items()}


def _profile(part: Part, backend: Any, texts: int, sampling: str) -> None:
    """Add the longest kernels of iterations of some texts, and the time in which none runs."""
    from torch.profiler import ProfilerActivity, profile

    budget = 64 if texts == 1 else 16
    config = DecodeConfig(budget=budget, max_tokens=400, sampling=SAMPLINGS[sampling])
    scheduler = start_texts(backend, texts, config)
    for _ in range(WARM_UP):
        scheduler.step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        for _ in range(PROFILED):
            scheduler.step()
        synchronize(backend.target.device)
        wall = 1000 * (time.perf_counter() - started) / PROFILED
    scheduler.close()
    rows = kernel_rows(profiler.key_averages(), PROFILED)
    busy, calls = (sum(row[name] for row in rows) for name in ("ms", "calls"))
    case = {"texts": texts, "sampling": sampling}
    part.add("gaps", **case, wall_ms=wall, kernels_ms=busy, idle_ms=wall - busy, kernels=calls)
    for row in rows[:25]:
        part.add("longest kernels", **case, **row)


PARTS: dict[str, Find] = {
    "machine": machine,
    "peer": device_parts.peer,
    "speed": speed,
    "iterations": iterations,
    "exact": device_parts.exact,
    "tests": device_parts.tests,
}
"""The parts in their order."""
DEVICE = Gpu
