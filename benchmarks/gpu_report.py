"""Whether treeflash runs on this GPU as it should, and how fast: one command, one file to send.

    python -m benchmarks.gpu_report --json report.json
    python -m benchmarks.gpu_report --json report.json --target Qwen/Qwen3-8B

It takes about ten minutes, and ends with the list of problems that it found. Its exit status is 0
if there are none, 1 if there are some, and 2 if PyTorch finds no GPU, with the reason. On a Mac it
only names the command that measures MLX.

- `machine`: the card, its driver, what Triton needs to compile, optional packages, and variables of
  the environment that PyTorch, Triton and CUDA read.
- `kernels`: whether each kernel is used, by dtype, width of heads and bits of stored keys, and how
  long it takes to compile them.
- `graphs`: which functions are captured as CUDA graphs, their replays, and failures.
- `texts`: whether every method writes the text of plain decoding, and graphs, masks and exact mode
  agree, with tiny models of random weights: with attention alone, and with recurrent layers.
- `memory`: what is reserved and used, and whether decoding goes on after memory ran out.
- `speed`: a forward pass by nodes and context, an iteration by phase for 1, 8 and 32 texts, and its
  longest kernels, with random weights in the shape of the largest Qwen3 model that fits the GPU and
  the folder of temporary files (`TMPDIR`).
- `target`: with `--target`, how far every method writes the text of plain decoding.
- `resources`: what each kernel takes of the GPU.

The tiny models come from the conformance suite: `pip install '.[cuda,testing]'`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import (
    Parser,
    Row,
    first_difference,
    package_versions,
    random_prompt,
    require_testing,
)
from benchmarks.decoding.iteration import verify_rows
from benchmarks.gpu import copy_bandwidth, read_bytes, synchronize
from benchmarks.random_pair import SHAPES, write_drafter, write_target
from benchmarks.report import Part, Report
from treeflash.cli.console import guarded
from treeflash.config import GIB, DecodeConfig, LoadConfig, Method, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig, decode
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import TreeflashError, is_out_of_memory
from treeflash.registry import loader

DTYPES = ("bfloat16", "float16", "float32")
OPTIONAL_PACKAGES = (
    *("triton", "accelerate", "flash-linear-attention", "causal-conv1d", "kernels"),
    *("bitsandbytes", "compressed-tensors", "gptqmodel"),
)
VARIABLES = ("CUDA_", "NVIDIA_TF32", "NVIDIA_VISIBLE", "PYTORCH_", "TORCH_", "TRITON_")
"""The beginnings of the names of variables that the machine's part lists. None is a secret, as
`NVIDIA_API_KEY` is."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("qwen3", {}),
    "float32, 8-bit KV cache": ("qwen3", {"kv_bits": 8}),
    "float32, 4-bit drafter": ("qwen3", {"draft_bits": 4}),
    "float32, gated delta nets": ("qwen3_5", {}),
    "float32, Mamba-2": ("granitemoehybrid", {}),
}
"""Families of tiny targets, and settings, in which every method writes the text of plain decoding
except where two logits are closer than the rounding of float32."""
CAPTURED = ("the target", "the drafter", "the AR head")
"""Functions that every iteration of a greedy text replays."""
METHODS: tuple[Method, ...] = ("dflash", "ddtree", "treeflash", "suffix")
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "sampled": SamplingConfig(temperature=0.8, top_p=0.9, seed=1),
}
TOKENS = 60
"""Tokens of a text."""
TOLERANCE = 0.05
"""Logits of two ways to compute half precision: root mean square difference in standard deviations.
Rounding gives 0.01; a key too many or too few more than 0.1."""
TREE = DraftTree.from_parents(np.arange(6, dtype=np.int32), np.array([-1, 0, 0, 1, 1, 2], np.int32))
PROMPT = [3, 4, 5] * 40
LARGE = (("qwen3-8b", 60, 20), ("qwen3-4b", 20, 10))
"""Shapes of `speed`, and the GiB that each takes of the GPU and of the temporary folder."""
WARM_UP, MEASURED, PROFILED = 8, 16, 10
"""Iterations before the measured ones, these, and the ones of the profile."""


def parser() -> Parser:
    """Return the command line."""
    options = Parser(__doc__)
    options.add_argument("--device", help="cuda, cuda:1, ... (default: cuda)")
    options.add_argument("--target", metavar="ID", help="also decode with this target")
    options.add_argument("--shape", choices=SHAPES, help="of `speed` (default: what fits)")
    options.add_number("--minutes", 10, "time for all parts")
    return options


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
        tried: the captures; see `treeflash_cuda.graphs.Capture`.
        replays: their numbers, by function.
        expected: functions that should have been replayed.
    """
    for capture in tried:
        if capture.reason:
            yield f"{capture.name} could not be captured: {capture.reason}"
    for name in expected:
        if not replays.get(name):
            yield f"{name} never ran from a CUDA graph"


def text_problem(what: str, plain: Sequence[int], tokens: Sequence[int]) -> str | None:
    """Return a line if a text differs from plain decoding's; None if it does not."""
    if list(plain) == list(tokens):
        return None
    place = first_difference(plain, tokens)
    return f"{what} differs from plain decoding at token {place} of {len(plain)}"


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


def toolchain_problems(compiler: str | None, header: Path) -> Iterator[str]:
    """Yield a line for each thing that Triton needs to compile and does not find."""
    if compiler is None:
        yield "Triton finds no C compiler, so no kernel can be used: install gcc"
    if not header.is_file():
        yield f"Triton finds no {header}, so no kernel can be used: install python3-dev"


def usage_problems(usages: Iterable[Row], most_shared: int) -> Iterator[str]:
    """Yield a line for each kernel that spills registers in 16 bits, or does not fit."""
    for usage in usages:
        if usage["shared_bytes"] > most_shared:
            yield f"{usage['kernel']} of {usage['model']} needs {usage['shared_bytes']} B"
        if usage["spilled_bytes"] and "float32" not in usage["model"]:
            yield f"{usage['kernel']} of {usage['model']} spills {usage['spilled_bytes']} B"


class Gpu:
    """A device, and the models that the parts of a report load on it."""

    def __init__(self, device: Any, folder: Path, args: Any, end: float) -> None:
        self.device = device  # torch's
        self.args = args
        self.end = end  # when the time for all parts is over
        self.folder = folder

    @property
    def is_late(self) -> bool:
        """Whether the time for all parts is over."""
        return time.time() > self.end

    def load(self, pair: tuple[Path, Path], **settings: Any) -> Any:
        """Load a pair on the device; see `LoadConfig`."""
        return loader("cuda")(*pair, LoadConfig(device=str(self.device), **settings))

    def write_tiny(self, family: str = "qwen3") -> tuple[Path, Path]:
        """Write a pair of tiny models of random weights into a new folder."""
        from treeflash.testing.models import write_pair

        return write_pair(Path(tempfile.mkdtemp(dir=self.folder)), family, vocab_size=500)

    def free_bytes(self) -> int:
        """Return the memory that is free; 0 for a processor."""
        import torch

        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0


def machine(gpu: Gpu, part: Part) -> None:
    """Find the driver, the clocks, what Triton needs, and what changes the software."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    # Triton looks for it in these places.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    part.add("tools", name="C compiler", found=compiler)
    part.add("tools", name="Python.h", found=header.is_file())
    for line in toolchain_problems(compiler, header):
        part.problem(line)
    for name, installed in package_versions(OPTIONAL_PACKAGES).items():
        part.add("packages", name=name, version=installed)
    for name, value in sorted(os.environ.items()):
        if name.startswith(VARIABLES):
            part.add("environment", name=name, value=value)
    if (command := shutil.which("nvidia-smi")) is not None:
        names = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
        done = subprocess.run(
            [command, f"--query-gpu={names}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        for line in done.stdout.splitlines():
            part.add("cards", **dict(zip(names.split(","), line.split(", "), strict=False)))


def kernels(gpu: Gpu, part: Part) -> None:
    """Check every kernel for every dtype and width."""
    import torch
    from treeflash_cuda.backend import EXAMINED_HEAD_DIMS
    from treeflash_cuda.cache import KV_BITS
    from treeflash_cuda.kernels import load_flash_attention
    from treeflash_cuda.operations import examined_shapes, load_operations
    from treeflash_cuda.quantised_weights import BITS

    for dtype, head_dim, kv_bits in product(DTYPES, EXAMINED_HEAD_DIMS, (None, KV_BITS)):
        shapes = replace(examined_shapes(head_dim, BITS), quantised=kv_bits is not None)
        case = {"dtype": dtype, "head_dim": head_dim, "kv_bits": kv_bits}
        where = f"{dtype}, heads of {head_dim} and kv_bits {kv_bits}"
        started = time.perf_counter()
        operations = load_operations(shapes, gpu.device, getattr(torch, dtype))
        part.add("compiling", **case, seconds=time.perf_counter() - started)
        for name, verdict in operations.verdicts.items():
            part.add("verdicts", **case, kernel=name, verdict=verdict)
        for line in kernel_problems(operations.verdicts, where):
            part.problem(line)
        if dtype == "float32" or kv_bits is not None:
            continue
        found, reason = load_flash_attention(gpu.device, getattr(torch, dtype), shapes)
        part.add("verdicts", **case, kernel="FlashAttention", verdict=reason)
        if found is None:
            part.problem(f"FlashAttention is not used with {where}: {reason}")


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


def graphs(gpu: Gpu, part: Part) -> None:
    """Decode texts in half precision, and find which functions ran from graphs."""
    for dtype in DTYPES[:2]:
        backend = gpu.load(gpu.write_tiny(), dtype=dtype)
        for sampling in SAMPLINGS.values():
            config = DecodeConfig(budget=16, max_tokens=TOKENS, sampling=sampling)
            for texts in (1, 4):
                run_texts(backend, [PROMPT] * texts, config)
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
    for name, (family, settings) in VARIANTS.items():
        if "draft_bits" in settings and gpu.device.type != "cuda":
            continue  # a processor does not quantise drafters
        backend = gpu.load(gpu.write_tiny(family), dtype="float32", **settings)
        compare_texts(part, backend, name)
    pair = gpu.write_tiny()
    for dtype in DTYPES[:2]:
        logits = {}
        for name, with_graphs, masks in (
            ("graphs", True, False),
            ("no graphs", False, False),
            ("masks", False, True),
        ):
            backend = gpu.load(pair, dtype=dtype, cuda_graphs=with_graphs)
            if masks:
                backend.verifier._has_row_pass, backend.target.prompt_attention = False, None
            session = SequenceSession(backend)
            session.extend(PROMPT * 5)
            logits[name] = session.logits(TREE)
        for name in ("graphs", "masks"):
            difference = relative_difference(logits[name], logits["no graphs"])
            part.add("logits", dtype=dtype, compared=f"{name}, no graphs", difference=difference)
            if line := logits_problem(f"trees with {name} in {dtype}", difference):
                part.problem(line)
        try:
            exact = gpu.load(pair, dtype=dtype, exact=True)
        except TreeflashError as error:
            part.add("exact mode", dtype=dtype, verdict=str(error))
            part.problem(f"exact mode is refused in {dtype}: {error}")
            continue
        part.add("exact mode", dtype=dtype, verdict=exact.inexact or "exact")
        compare_texts(part, exact, f"exact {dtype}")


def target(gpu: Gpu, part: Part) -> None:
    """Decode with a real target, and count how far methods agree in half precision."""
    import treeflash

    if not gpu.args.target:
        part.note("target was left out: pass --target")
        return
    model = treeflash.load(gpu.args.target, backend="cuda", device=str(gpu.device))
    backend: Any = model.backend
    prompt = "Explain in a few sentences why the sky is blue."
    methods: list[Method] = ["suffix"]
    if backend.drafter is not None:
        methods += ["ddtree"] if backend.head is None else ["dflash", "ddtree", "treeflash"]
    plain = model.generate(prompt, method="ar", max_tokens=200)
    for method in methods:
        found = model.generate(prompt, method=method, max_tokens=200)
        place = first_difference(plain.token_ids, found.token_ids)
        part.add("texts", method=method, tokens=len(plain.token_ids), equal_up_to=place)
    for line in kernel_problems(backend.target.operations.verdicts, gpu.args.target):
        part.problem(line)
    for line in graph_problems(
        backend.target.graphs.tried, backend.target.graphs.replays, CAPTURED[:1]
    ):
        part.problem(line)


def speed(gpu: Gpu, part: Part) -> None:
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
    contexts = [x for x in (64, 1024, 8192, 32_768) if x < backend.max_positions]
    for context in contexts[: 1 if shape == "tiny" else None]:
        for row in verify_rows(backend, [context], [1, 8, 16, 64], 5):
            limit = 1000 * read_bytes(backend, settings, context) / bandwidth
            part.add("passes", **row, share_of_bandwidth=limit / row["verify_ms"])
        if gpu.is_late:
            part.note(f"speed was cut short after passes at {context} positions")
            return
    for count, (sampling, settings_of_text) in product((1, 8, 32), SAMPLINGS.items()):
        budget = 64 if count == 1 else 16
        config = DecodeConfig(budget=budget, max_tokens=400, sampling=settings_of_text)
        prompts = [random_prompt(backend.vocab_size, 256)] * count
        part.add(
            "iterations",
            texts=count,
            nodes=budget,
            sampling=sampling,
            **iteration_row(backend, prompts, config),
        )
        if gpu.is_late:
            part.note(f"speed was cut short after {count} texts")
            return
    if gpu.device.type == "cuda":
        _profile(part, backend)


def iteration_row(backend: Any, prompts: Sequence[Sequence[int]], config: DecodeConfig) -> Row:
    """Return the median milliseconds of an iteration and its phases, after some to warm up.

    All texts are decoded in every one of them: their prompts run in the first iteration.
    """
    tokens = sum(map(len, prompts))
    scheduler = Scheduler(
        backend, SchedulerConfig(max_parallel=len(prompts), lone_prefill_chunk=tokens)
    )
    for prompt in prompts:
        scheduler.submit(Request(prompt_ids=prompt, config=config))
    times: list[float] = []
    phases: dict[str, list[float]] = {}
    for number in range(WARM_UP + MEASURED):
        started = time.perf_counter()
        events = scheduler.step()
        synchronize(backend.target.device)
        ended = time.perf_counter()
        steps = []
        for _, step in events:
            if isinstance(step, Exception):
                raise step
            steps.append(step)
        if number < WARM_UP or not steps:
            continue
        times.append(1000 * (ended - started))
        for phase, seconds in steps[0].seconds.items():
            phases.setdefault(f"{phase}_ms", []).append(1000 * seconds)
    scheduler.close()
    row: Row = {"iteration_ms": median(times)}
    return row | {name: median(values) for name, values in phases.items()}


def _profile(part: Part, backend: Any) -> None:
    """Add the longest kernels of iterations of one text, and the time in which none runs."""
    from torch.profiler import ProfilerActivity, profile

    config = DecodeConfig(budget=64, max_tokens=400)
    steps = decode(
        backend, Request(prompt_ids=random_prompt(backend.vocab_size, 256), config=config)
    )
    for _ in range(WARM_UP):
        next(steps)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        for _ in range(PROFILED):
            next(steps)
        synchronize(backend.target.device)
        wall = 1000 * (time.perf_counter() - started) / PROFILED
    steps.close()
    rows = kernel_rows(profiler.key_averages(), PROFILED)
    busy, calls = (sum(row[name] for row in rows) for name in ("ms", "calls"))
    part.add("gaps", wall_ms=wall, kernels_ms=busy, idle_ms=wall - busy, kernels=calls)
    for row in rows[:25]:
        part.add("longest kernels", **row)


def memory(gpu: Gpu, part: Part) -> None:
    """Watch memory while texts join, and decode on after it ran out."""
    import torch

    backend = gpu.load(gpu.write_tiny(), dtype="bfloat16")
    report = backend.device_report()
    part.add("reserved", gib=(report.reserved_bytes or 0) / GIB)
    config = DecodeConfig(budget=16, max_tokens=40)
    for count in (1, 8, 32):
        run_texts(backend, [PROMPT] * count, config)
        part.add("texts", texts=count, **_memory_row(gpu))
    expected = token_ids(backend, config)
    free = gpu.free_bytes()
    try:
        torch.empty(4 * max(free, 1 << 44), dtype=torch.uint8, device=gpu.device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        part.add("out of memory", message=str(error).partition("\n")[0])
    else:
        part.problem("an allocation of more memory than there is succeeded")
    found = token_ids(backend, config)
    if line := text_problem("a text after memory ran out", expected, found):
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


def compare_texts(part: Part, backend: Any, dtype: str) -> None:
    """Add rows and perhaps problems: the texts of methods against the text of plain decoding."""

    def text(**settings: Any) -> list[int]:
        return token_ids(backend, DecodeConfig(max_tokens=TOKENS, **settings))

    for name, sampling in SAMPLINGS.items():
        plain = text(method="ar", sampling=sampling)
        for method in METHODS:
            found = text(method=method, budget=12, sampling=sampling)
            part.add(
                "texts",
                dtype=dtype,
                method=method,
                sampling=name,
                tokens=len(plain),
                equal_up_to=first_difference(plain, found),
            )
            if line := text_problem(f"{method}, {name}, in {dtype}", plain, found):
                part.problem(line)


def token_ids(backend: Any, config: DecodeConfig) -> list[int]:
    """Return the new tokens of a text after `PROMPT`."""
    steps = decode(backend, Request(prompt_ids=PROMPT, config=config))
    return [token for step in steps for token in step.tokens]


def run_texts(backend: Any, prompts: Sequence[Sequence[int]], config: DecodeConfig) -> None:
    """Decode texts together to their ends."""
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=len(prompts)))
    requests = [Request(prompt_ids=prompt, config=config) for prompt in prompts]
    for _ in scheduler.decode(requests):
        pass


def relative_difference(actual: Any, expected: Any) -> float:
    """Return the root mean square difference in standard deviations."""
    return float(np.sqrt(np.square(actual - expected).mean()) / expected.std())


PARTS: dict[str, Callable[[Gpu, Part], None]] = {
    "machine": machine,
    "kernels": kernels,
    "graphs": graphs,
    "texts": texts,
    "memory": memory,
    "speed": speed,
    "target": target,
    "resources": resources,
}


def has_metal() -> bool:
    """Return whether this machine is a Mac whose GPU MLX can use."""
    if find_spec("mlx") is None:
        return False
    import mlx.core as mx

    return bool(mx.metal.is_available())


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts, print, write."""
    args = parser().parse_args(argv)
    loader("cuda")  # its error is clearer than an import's
    require_testing("cuda")
    from treeflash_cuda.device import choose_device, device_facts

    try:
        device = choose_device(args.device)
    except TreeflashError as error:
        if has_metal():
            print("this report is about CUDA; python -m benchmarks.mac_report is about Macs")
            return 0
        report = Report("gpu_report", args.json, {"device": None}, 0)
        report.facts["why"] = str(error)
        report.write()
        raise
    report = Report("gpu_report", args.json, dict(device_facts(device)), 60 * args.minutes)
    with tempfile.TemporaryDirectory() as folder:
        gpu = Gpu(device, Path(folder), args, report.end)
        for name, find in PARTS.items():
            report.run(name, partial(find, gpu))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
