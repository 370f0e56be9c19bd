"""Whether treeflash runs on this Mac as it should, and how fast: one command, one file to send.

    python -m benchmarks.mac_report --json report.json
    python -m benchmarks.mac_report --json report.json --target mlx-community/Qwen3-4B-4bit

It ends with the list of problems that it found. Its exit status is 0 if there are none, and 1 if
there are some.

- `kernels`: whether each kernel is right on this GPU, and how fast beside MLX's operations.
- `texts`: whether every method writes the text of plain decoding, with tiny models of random
  weights in float32, and in bfloat16 with exact mode; or why that is refused.
- `mlx-lm`, `passes`, `host` and `speed`: what `benchmarks.mac` measures of the target.
- `buffers`: plain decoding with as many operations in a command buffer as MLX chooses, and with
  more. MLX may then copy the keys of a long text for every token, or wait less; nobody knows.
- `memory`: the peak of all parts, and what the device tells at the end.

The tiny models come from the conformance suite: `pip install '.[mlx,testing]'`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from benchmarks import mac
from benchmarks.common import Parser, Row, describe, require_testing, supported_methods
from benchmarks.decoding.iteration import verify_rows
from benchmarks.gpu_report import compare_texts
from benchmarks.report import Part, Report
from treeflash.cli.console import guarded
from treeflash.cli.options import load_model
from treeflash.config import GIB, LoadConfig
from treeflash.errors import UnsupportedModelError
from treeflash.language_model import LanguageModel
from treeflash.registry import examine_device, loader
from treeflash.text.prompt import encode

MINUTES = 20
OPERATIONS = (None, 200)
"""Numbers of operations in a command buffer; MLX chooses 20 to 50 by the chip."""
T = TypeVar("T")


def parser() -> Parser:
    """Build the parser of the command line."""
    options = mac.parser()
    options.description = (__doc__ or "").partition("\n")[0]
    options.add_number("--minutes", MINUTES, "time for all parts")
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


def kernels(device: str | None, part: Part) -> None:
    """Check every kernel on shapes of common models."""
    found = examine_device("mlx", LoadConfig(device=device)).kernels
    for kernel, verdicts in found.items():
        for size, verdict in verdicts.items():
            part.add("verdicts", kernel=kernel, size=size, verdict=verdict)
    if not found:
        part.notes.append("treeflash's kernels are not tried on this device")
    for line in kernel_problems(found):
        part.problem(line)


def texts(device: str | None, part: Part) -> None:
    """Compare the texts of all methods with plain decoding's."""
    from treeflash.testing import models

    with tempfile.TemporaryDirectory() as folder:
        target, drafter = Path(folder) / "target", Path(folder) / "drafter"
        models.write_target(target, "qwen3", seed=1, vocab_size=500, hidden_size=64)
        models.write_drafter(drafter, target, seed=2)
        for dtype, exact in (("float32", None), ("bfloat16", True)):
            config = LoadConfig(device=device, dtype=dtype, exact=exact)
            try:
                backend = loader("mlx")(target, drafter, config)
            except UnsupportedModelError as error:
                part.notes.append(f"{dtype}: {error}")
                continue
            compare_texts(part, backend, dtype)


def passes(model: Callable[[], LanguageModel], args: Any, part: Part) -> None:
    """Measure the target's pass by nodes and committed positions."""
    part.add("pair", **describe(model().backend))
    for context in args.contexts:
        for row in verify_rows(model().backend, [context], args.sizes, args.repeats):
            part.add("passes", **row)


def host(model: Callable[[], LanguageModel], args: Any, part: Part) -> None:
    """Measure how long a pass takes to build."""
    part.add("host", **mac.host_row(model().backend, args.repeats))


def speed(model: Callable[[], LanguageModel], args: Any, part: Part) -> None:
    """Measure every method that the pair supports."""
    prompts = [encode(model().tokenizer, prompt).token_ids for prompt in mac.PROMPTS]
    for method in supported_methods(model().backend):
        part.add("methods", **mac.method_row(model(), method, prompts, args.max_tokens))


def mlx_lm(args: Any, part: Part) -> None:
    """Measure mlx-lm's own loop over the same weights, before this process loads them."""
    part.add("methods", **mac.mlx_lm_row(args))


def buffers(args: Any, part: Part) -> None:
    """Measure plain decoding with other numbers of operations in a command buffer."""
    for operations in OPERATIONS:
        environment = {} if operations is None else {"MLX_MAX_OPS_PER_BUFFER": str(operations)}
        for row in in_process(plain, args, environment=environment):
            part.add("plain", operations=operations or "chosen by MLX", **row)


def plain(args: Any) -> list[Row]:
    """Load the target, and measure plain decoding."""
    return mac.plain_rows(load_model(args).backend)


def in_process(function: Callable[..., T], *arguments: Any, environment: Mapping[str, str]) -> T:
    """Call a function in a separate process, with more variables in its environment."""
    context = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, environment), ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def memory(part: Part) -> None:
    """Tell the peak of memory, swap and pressure after the other parts."""
    import mlx.core as mx
    from treeflash_mlx.device import device_facts

    part.add("peak", gib=mx.get_peak_memory() / GIB)
    for name, fact in device_facts().items():
        part.add("device", name=name, fact=fact)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts, print, write."""
    args = parser().parse_args(argv)
    loader("mlx")  # its error is clearer than an import's
    require_testing("mlx")
    from treeflash_mlx.device import choose_device, device_facts

    choose_device(args.device)
    report = Report("mac_report", args.json, dict(device_facts()), 60 * args.minutes)
    model = cache(lambda: load_model(args))
    for name, find in (("kernels", kernels), ("texts", texts)):
        report.run(name, partial(find, args.device))
    # These two load the weights in separate processes, before this process loads them.
    report.run("mlx-lm", partial(mlx_lm, args))
    report.run("buffers", partial(buffers, args))
    for name, measure in (("passes", passes), ("host", host), ("speed", speed)):
        report.run(name, partial(measure, model, args))
    report.run("memory", memory)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
