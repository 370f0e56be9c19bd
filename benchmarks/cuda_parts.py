"""The parts of the report about a GPU: graphs, kernels, memory, and iterations at full size."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import device_parts
from benchmarks.common import (
    Row,
    alternate_ms,
    layers_of_transformers,
    package_versions,
    random_prompt,
    random_tree,
)
from benchmarks.decoding.iteration import verify_rows
from benchmarks.device_parts import (
    SAMPLINGS,
    TINY_PROMPT,
    TOKENS,
    Device,
    Find,
    exact,
    method_rows,
    peer_row,
    prompt_ids,
    run_command,
    text_problem,
    tiny_text,
    tiny_texts,
    tiny_texts_together,
)
from benchmarks.random_pair import SHAPES, write_drafter, write_target
from benchmarks.report import LeftOutError, Part
from treeflash.config import GIB, DecodeConfig, LoadConfig, Method, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.decoding.interfaces import Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import is_quantised, read_config
from treeflash.errors import ConfigError, UnsupportedModelError, first_line, is_out_of_memory
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response

DTYPES = ("bfloat16", "float16")
KERNEL_CASES = (
    *(("bfloat16", head_dim, False) for head_dim in (64, 128, 256)),
    *(("float16", 64, False), ("float16", 128, False)),
    *(("float32", 128, False), ("bfloat16", 128, True)),
)
"""Number format, width of heads, and whether keys are stored in 8 bits: what real models have."""
COMPILERS = 4
"""Processes that compile kernels at once."""
OPTIONAL_PACKAGES = (
    *("triton", "accelerate", "flash-linear-attention", "causal-conv1d", "kernels"),
    *("bitsandbytes", "compressed-tensors", "gptqmodel"),
)
VARIABLES = ("CUDA_", "NVIDIA_TF32", "NVIDIA_VISIBLE", "PYTORCH_", "TORCH_", "TRITON_")
"""The beginnings of the names of variables that the machine's part lists. None is a secret, as
`NVIDIA_API_KEY` is."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("qwen3", {"dtype": "float32"}),
    "float32, 8-bit KV cache": ("qwen3", {"dtype": "float32", "kv_bits": 8}),
    "float32, 4-bit drafter": ("qwen3", {"dtype": "float32", "draft_bits": 4}),
    "float32, gated delta nets": ("qwen3_5", {"dtype": "float32"}),
    "float32, Mamba-2": ("granitemoehybrid", {"dtype": "float32"}),
    **{f"exact {dtype}": ("qwen3", {"dtype": dtype, "exact": True}) for dtype in DTYPES},
}
"""Families of tiny targets, and settings."""
CAPTURED = ("the target", "the drafter", "the AR head")
"""Functions that every iteration of a greedy text replays."""
TOLERANCE = 0.05
"""Logits of two ways to compute half precision: root mean square difference in standard deviations.
Rounding gives 0.01; a key too many or too few more than 0.1."""
TREE = DraftTree.from_parents(np.arange(6, dtype=np.int32), np.array([-1, 0, 0, 1, 1, 2], np.int32))
LOSS_TOLERANCE = 0.05
"""Relative difference of a step's loss in half precision; a wrong mask or position gives more."""
LARGE = (("qwen3-8b", 60, 20), ("qwen3-4b", 20, 10))
"""Shapes of `iterations`, and the GiB that each takes of the GPU and of the temporary folder."""
WARM_UP, MEASURED, PROFILED = 8, 16, 10
"""Iterations before the measured ones, these, and the ones of the profile."""
PROMPT_TOKENS = 256
WIDE_TREES, WIDE_NODES, WIDE_CONTEXT = 3, 256, 64
"""Trees that no graph holds together today, their nodes, and committed positions before each."""
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "FP8": ("FineGrainedFP8Config", {}),
    "4 bits of bitsandbytes": ("BitsAndBytesConfig", {"load_in_4bit": True}),
}
"""Formats that transformers can give a target here: its class, and settings."""
TIMED_CALLS = {
    "draft": ("drafter", "draft"),
    "tables": ("head", "transitions"),
    "verify": ("verifier", "run"),
    "commit": ("verifier", "commit"),
}
"""The calls of an iteration that the device's clock measures: a backend's role, and a method."""
LEFT_FREE = 200 << 20
"""Bytes that are left free when memory is to run out."""


# What a part has found is judged by functions of plain values.


def kernel_problems(verdicts: Mapping[str, str], where: str) -> Iterator[str]:
    """Yield a line for each operation that runs without its kernel.

    Args:
        verdicts: what runs each operation, or the reason; see `Operations.verdicts`.
        where: dtype and shapes.
    """
    for name, verdict in verdicts.items():
        if not verdict.startswith("used"):
            yield f"{name} runs in PyTorch with {where}: {verdict}"


def graph_problems(
    tried: Iterable[Any], replays: Mapping[str, int], expected: Sequence[str]
) -> Iterator[str]:
    """Yield a line for each function that could not be captured, or was not replayed.

    Args:
        tried: the captures; see `treeflash_cuda.gpu.graphs.Capture`.
        replays: their numbers, by function.
        expected: functions that should have been replayed.
    """
    for capture in tried:
        if capture.reason:
            yield f"{capture.name} could not be captured: {capture.reason}"
    for name in expected:
        if not replays.get(name):
            yield f"{name} never ran from a CUDA graph"


def logits_problem(what: str, difference: float) -> str | None:
    """Return a line if two ways to compute the same logits differ by more than rounding."""
    if difference <= TOLERANCE:  # NaN is not
        return None
    return f"{what}: the logits differ by {difference:.1%} of their standard deviation"


def choose_shape(free_memory: int, free_disk: int) -> str:
    """Return the largest shape that fits these bytes of the GPU and of the disk."""
    fitting = (
        name
        for name, memory_gib, disk_gib in LARGE
        if free_memory > memory_gib << 30 and free_disk > disk_gib << 30
    )
    return next(fitting, "tiny")


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


def usage_problems(usages: Iterable[Row], most_shared: int) -> Iterator[str]:
    """Yield a line for each kernel that spills registers in 16 bits, or does not fit."""
    for usage in usages:
        if usage["shared_bytes"] > most_shared:
            yield f"{usage['kernel']} of {usage['model']} needs {usage['shared_bytes']} B"
        if usage["spilled_bytes"] and "float32" not in usage["model"]:
            yield f"{usage['kernel']} of {usage['model']} spills {usage['spilled_bytes']} B"


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
    run_command(part, "cards", "nvidia-smi", query, "--format=csv")


def peer(gpu: Gpu, part: Part) -> None:
    """Measure transformers' `generate` with the weights of the real target."""
    import torch
    from transformers import AutoModelForCausalLM

    pair = gpu.locate()
    tokenizer = Tokenizer.from_folder(pair.target, thinking=pair.thinking)
    stop = sorted(tokenizer.stop_token_ids)
    dtype = "auto" if gpu.args.dtype is None else getattr(torch, gpu.args.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(pair.target, dtype=dtype)
    model = model.to(gpu.device).eval()

    def generate(ids: list[int]) -> list[int]:
        prompt = torch.tensor([ids], device=gpu.device)
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=gpu.args.max_tokens,
            do_sample=False,
            eos_token_id=stop or None,
            pad_token_id=0,
        )
        return list(output[0, len(ids) :].tolist())

    part.add("methods", **peer_row("transformers", generate, prompt_ids(tokenizer)))


def speed(gpu: Gpu, part: Part) -> None:
    """Measure every method of the real pair, and what of it runs without kernels and graphs."""
    backend: Any = device_parts.speed(gpu, part).backend
    target = backend.target
    if target.operations is not None:
        for line in kernel_problems(target.operations.verdicts, "the real target"):
            part.problem(line)
    for line in graph_problems(target.graphs.tried, target.graphs.replays, CAPTURED[:1]):
        part.problem(line)


def draft_bits(gpu: Gpu, part: Part) -> None:
    """Measure the real pair with drafters of fewer bits, whose texts must be good all the same."""
    from treeflash_cuda.quantised_weights import BITS

    for bits in BITS:
        for row in changed_rows(gpu, part, f"drafter in {bits} bits", draft_bits=bits)[1:]:
            part.add("methods", **row)
        if gpu.is_late:
            part.note(f"drafters were cut short after {bits} bits")
            return


def formats(gpu: Gpu, part: Part) -> None:
    """Measure the real pair with its target in formats of fewer bits that can be had here."""
    pair = gpu.locate()
    if is_quantised(read_config(pair.target)):
        raise LeftOutError("the target's weights are quantised already")
    for name, (kind, settings) in FORMATS.items():
        folder = gpu.folder / name
        try:
            write_quantised(pair.target, folder, kind, settings)
        except Exception as error:  # of packages that need not be there, or of the GPU
            part.note(f"{name} cannot be had here: {first_line(error)}")
            continue
        models = {"target": str(folder), "drafter": pair.drafter and str(pair.drafter)}
        for row in changed_rows(gpu, part, name, **models):
            part.add("methods", **row)
        shutil.rmtree(folder)
        if gpu.is_late:
            part.note(f"formats were cut short after {name}")
            return


def write_quantised(target: Path, folder: Path, kind: str, settings: Mapping[str, Any]) -> None:
    """Write a target as transformers quantises it; raises what the quantiser's package raises."""
    import transformers

    quantisation = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        target, quantization_config=quantisation, dtype="auto"
    )
    shutil.copytree(target, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin"))
    model.save_pretrained(folder)


def changed_rows(gpu: Gpu, part: Part, name: str, **changes: Any) -> list[Row]:
    """Measure plain decoding and trees of the real pair after changes; notes why they are refused.

    Args:
        gpu: loads the pair.
        part: gets the note.
        name: of the changes.
        changes: options that replace the command line's.
    """
    try:
        model = gpu.load_model(**changes)
    except (ConfigError, UnsupportedModelError) as error:
        part.note(f"{name} is refused: {error}")
        return []
    prompts = prompt_ids(model.tokenizer)[:1]
    methods: tuple[Method, ...] = ("ar", "suffix" if model.backend.drafter is None else "treeflash")
    rows = method_rows(model, methods, prompts, gpu.args.max_tokens)
    return [row | {"method": f"{row['method']}, {name}"} for row in rows]


def iterations(gpu: Gpu, part: Part) -> None:
    """Measure passes and iterations of a pair of random weights."""
    free_disk = shutil.disk_usage(gpu.folder).free
    shape = gpu.args.shape or choose_shape(gpu.free_bytes(), free_disk)
    settings = SHAPES[shape]
    dtype = "bfloat16" if gpu.device.type == "cuda" else "float32"
    pair = gpu.folder / "target", gpu.folder / "drafter"
    write_target(pair[0], settings, gpu.device, dtype)
    write_drafter(pair[1], settings, gpu.device, dtype)
    backend = gpu.load(pair, dtype=dtype)
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
        for row in verify_rows(backend, [context], [1, 8, 16, 64], 5):
            limit = 1000 * read_bytes(backend, settings, context) / bandwidth
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
    tree = random_tree(backend.vocab_size, WIDE_NODES)
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
    """Measure the bytes per second of a large copy, read and written, the best of ten."""
    import torch

    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size / min(times)


def read_bytes(backend: Any, shape: Row, context: int) -> int:
    """Count what a forward pass must read: the weights, and the KV cache of the context."""
    weights = sum(p.numel() * p.element_size() for p in backend.target.model.parameters())
    embeddings = backend.target.embeddings
    if not shape["tie_word_embeddings"]:  # the lookup reads one row per token
        weights -= embeddings.numel() * embeddings.element_size()
    width = shape["num_key_value_heads"] * shape["head_dim"] * embeddings.element_size()
    return int(weights + 2 * shape["num_hidden_layers"] * width * context)


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
                if (owner := getattr(backend, role)) is not None:
                    timed = self._timed(name, getattr(owner, method))
                    patches.enter_context(mock.patch.object(owner, method, timed))
            yield

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        def timed(*args: Any) -> Any:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            result = call(*args)
            last.record()
            self._calls.append((name, first, last))
            return result

        return timed

    def read(self) -> dict[str, float]:
        """Return the milliseconds of each call since the last time; the device is idle."""
        found: dict[str, float] = {}
        for name, first, last in self._calls:
            name = f"{name}_device_ms"
            found[name] = found.get(name, 0.0) + first.elapsed_time(last)
        self._calls.clear()
        return found


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


def graphs(gpu: Gpu, part: Part) -> None:
    """Decode texts in half precision, and find which functions ran from graphs."""
    for dtype in DTYPES:
        backend = gpu.load(gpu.write_tiny(), dtype=dtype)
        for sampling in SAMPLINGS.values():
            config = DecodeConfig(budget=16, max_tokens=TOKENS, sampling=sampling)
            for texts in (1, 4):
                run_texts(backend, [TINY_PROMPT] * texts, config)
        found = backend.target.graphs
        for name in dict.fromkeys([*CAPTURED, *(x.name for x in found.tried)]):
            done = [x for x in found.tried if x.name == name and not x.reason]
            failed = [x.reason for x in found.tried if x.name == name and x.reason]
            row = {"dtype": dtype, "function": name, "captured": len(done)}
            row["capture_ms"] = 1000 * median([x.seconds for x in done] or [0])
            part.add("captures", **row, replays=found.replays[name], failed="; ".join(failed))
        for line in graph_problems(found.tried, found.replays, CAPTURED):
            part.problem(f"{line} ({dtype})")


def texts(gpu: Gpu, part: Part) -> None:
    """Compare texts and logits of different ways to compute them."""
    is_gpu = gpu.device.type == "cuda"  # on a processor, kernels for few bits may be missing
    variants = {x: y for x, y in VARIANTS.items() if is_gpu or "draft_bits" not in y[1]}
    tiny_texts(gpu, part, variants, refused=part.problem)
    tiny_texts_together(gpu, part)
    pair = gpu.write_tiny()
    for dtype in DTYPES:
        logits = {}
        for name, with_graphs, masks in (
            ("graphs", True, False),
            ("no graphs", False, False),
            ("masks", False, True),
        ):
            with layers_of_transformers() if masks else nullcontext():
                backend = gpu.load(pair, dtype=dtype, cuda_graphs=with_graphs)
            if masks:
                backend.target.passes.has_row_pass = False
                backend.target.prompt_attention = None
            session = SequenceSession(backend)
            session.extend(TINY_PROMPT * 5)
            logits[name] = session.logits(TREE)
        for name in ("graphs", "masks"):
            difference = relative_difference(logits[name], logits["no graphs"])
            part.add("logits", dtype=dtype, compared=f"{name}, no graphs", difference=difference)
            if line := logits_problem(f"trees with {name} in {dtype}", difference):
                part.problem(line)


def memory(gpu: Gpu, part: Part) -> None:
    """Watch memory while texts join, and decode on after it ran out."""
    import torch

    backend = gpu.load(gpu.write_tiny(), dtype="bfloat16")
    report = backend.device_report()
    part.add("reserved", gib=(report.reserved_bytes or 0) / GIB)
    config = DecodeConfig(budget=16, max_tokens=40)
    for count in (1, 8, 32):
        run_texts(backend, [TINY_PROMPT] * count, config)
        part.add("texts", texts=count, **_memory_row(gpu))
    expected = tiny_text(backend, budget=16)
    try:
        torch.empty(4 * max(gpu.free_bytes(), 1 << 44), dtype=torch.uint8, device=gpu.device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        part.add("out of memory", message=str(error).partition("\n")[0])
    else:
        part.problem("an allocation of more memory than there is succeeded")
    if line := text_problem("a text after memory ran out", expected, tiny_text(backend, budget=16)):
        part.problem(line)
    if (size := gpu.free_bytes() - LEFT_FREE) > 0:
        filler = torch.empty(size, dtype=torch.uint8, device=gpu.device)
        run_texts(backend, [TINY_PROMPT] * 20, config)  # needs graphs of other sizes
        failed = [x.name for x in backend.target.graphs.tried if x.reason]
        part.add("texts", texts=20, failed_captures=len(failed), **_memory_row(gpu))
        del filler
        found = tiny_text(backend, budget=16)
        if line := text_problem("a text after captures without memory", expected, found):
            part.problem(line)


def _memory_row(gpu: Gpu) -> Row:
    import torch

    if gpu.device.type != "cuda":
        return {}
    statistics = {
        "allocated_gib": torch.cuda.memory_allocated(gpu.device),
        "cached_gib": torch.cuda.memory_reserved(gpu.device),
        "free_gib": gpu.free_bytes(),
    }
    return {name: nbytes / GIB for name, nbytes in statistics.items()}


def kernels(gpu: Gpu, part: Part) -> None:
    """Check every kernel for the formats and widths of real models."""
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    with ProcessPoolExecutor(COMPILERS, context) as pool:
        cases = [(case, pool.submit(check_kernels, gpu, *case)) for case in KERNEL_CASES]
        for (dtype, head_dim, quantised), found in cases:
            checked = found.result()
            case = {"dtype": dtype, "head_dim": head_dim, "quantised_keys": quantised}
            where = ", ".join(f"{name} {value}" for name, value in case.items())
            part.add("compiling", **case, seconds=checked.seconds)
            for name, verdict in checked.verdicts.items():
                # The rows' largest difference, of which the tolerance is what the check allows.
                difference = checked.differences.get(name)
                part.add("verdicts", **case, kernel=name, verdict=verdict, difference=difference)
            for name, error in checked.errors.items():
                part.add("errors", **case, kernel=name, error=error)
            for line in kernel_problems(checked.verdicts, where):
                part.problem(line)
            if checked.flash is not None:
                part.problem(f"FlashAttention is not used with {where}: {checked.flash}")
            if gpu.is_late:
                pool.shutdown(cancel_futures=True)
                part.note(f"kernels were cut short after {where}")
                return


@dataclass(frozen=True)
class CheckedKernels:
    """What a check of all kernels found; see `Operations`."""

    seconds: float
    verdicts: dict[str, str]
    differences: dict[str, float]
    errors: dict[str, str]
    flash: str | None  # why FlashAttention is not used; None if it is, or has no part


def check_kernels(gpu: Gpu, dtype: str, head_dim: int, quantised: bool) -> CheckedKernels:
    """Check all kernels in one case."""
    import torch
    from treeflash_cuda.gpu.kernels import load_flash_attention
    from treeflash_cuda.operations import examined_shapes, load_operations
    from treeflash_cuda.quantised_weights import BITS

    shapes = replace(examined_shapes(head_dim, BITS), quantised=quantised)
    started = time.perf_counter()
    operations = load_operations(shapes, gpu.device, getattr(torch, dtype))
    seconds = time.perf_counter() - started
    flash = None
    if dtype != "float32" and not quantised:
        found, reason = load_flash_attention(gpu.device, getattr(torch, dtype), shapes)
        flash = reason if found is None else None
    details = operations.verdicts, dict(operations.differences), dict(operations.errors)
    return CheckedKernels(seconds, *details, flash)


def training(gpu: Gpu, part: Part) -> None:
    """Take one step of training on the device, and compare its loss with a processor's."""
    if find_spec("accelerate") is None:
        raise LeftOutError("the package accelerate is not installed")
    target, losses = gpu.write_tiny()[0], {}
    dtype = "bfloat16" if gpu.device.type == "cuda" else "float32"
    context = multiprocessing.get_context("spawn")  # accelerate has one device in a process
    for name, load in (
        ("a processor", LoadConfig(device="cpu", dtype="float32")),
        ("the device", LoadConfig(device=gpu.args.device, dtype=dtype)),
    ):
        with ProcessPoolExecutor(1, context) as pool:
            output = gpu.folder / f"training of {name}"
            losses[name] = pool.submit(first_loss, target, output, load).result()
        part.add("first step", where=name, loss=losses[name])
    processor, device = losses.values()
    if not abs(device - processor) <= LOSS_TOLERANCE * processor:
        part.problem(f"the loss of a first step is {device:.4f}, on a processor {processor:.4f}")


def first_loss(target: Path, output: Path, load: LoadConfig) -> float:
    """Return the loss of the first step on random texts."""
    from treeflash_cuda.training.entry import train

    ids = np.random.default_rng(2).integers(3, 500, (4, 40)).tolist()
    texts = [Response(prompt_ids=tuple(x[:10]), response_ids=tuple(x[10:])) for x in ids]
    config = TrainConfig(
        layers=1,
        block_size=5,
        top_tokens=8,
        sequences=2,
        anchors=8,
        steps=1,
        validation_sequences=0,
    )
    records = train(target, texts, output, config, load)
    return next(float(record["loss"]) for record in records if "step" in record)


def resources(gpu: Gpu, part: Part) -> None:
    """Compile all kernels once more, for the shapes of real models, and read what they take."""
    import torch

    if gpu.device.type != "cuda":
        return
    properties: Any = torch.cuda.get_device_properties(gpu.device)  # more than its types tell
    from benchmarks import kernels  # from here on, calls of kernels compile and run nothing

    for model in kernels.SHAPES:
        usages = list(kernels.measure(10 * properties.major + properties.minor, model))
        for usage in usages:
            part.add("resources", **usage)
        for line in usage_problems(usages, properties.shared_memory_per_block_optin):
            part.problem(line)
        if gpu.is_late:
            part.note(f"resources were cut short after {model}")
            return


def run_texts(backend: Any, prompts: Sequence[Sequence[int]], config: DecodeConfig) -> None:
    """Decode texts together to their ends."""
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=len(prompts)))
    requests = [Request(prompt_ids=prompt, config=config) for prompt in prompts]
    for _ in scheduler.decode(requests):
        pass


def relative_difference(actual: Any, expected: Any) -> float:
    """Return the root mean square difference in standard deviations."""
    return float(np.sqrt(np.square(actual - expected).mean()) / expected.std())


PARTS: dict[str, Find] = {
    "machine": machine,
    "peer": peer,
    "speed": speed,
    "iterations": iterations,
    "exact": exact,
    "draft_bits": draft_bits,
    "formats": formats,
    "graphs": graphs,
    "texts": texts,
    "memory": memory,
    "training": training,
    "kernels": kernels,
    "resources": resources,
}
"""The parts in their order."""
DEVICE = Gpu
