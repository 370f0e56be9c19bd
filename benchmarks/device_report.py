"""Whether treeflash runs on this GPU or Mac as it should, and how fast: one file to send.

    python -m benchmarks.device_report --json report.json
    python -m benchmarks.device_report --json report.json --target Qwen/Qwen3-8B
    python -m benchmarks.device_report --json report.json --target Qwen/Qwen3-8B-FP8
    python -m benchmarks.device_report --json report.json --target mlx-community/Qwen3-4B-4bit

It ends with the list of problems that it found. Its exit status is 0 if there are none, 1 if there
are some, and 2 if there is no accelerator, with the reason. The models are downloaded before the
time for the parts begins. They run in this order, each in its own process:

- `machine`: the device, its driver, optional packages, what is needed to compile, its temperature.
- `peer`: tokens per second of transformers or mlx-lm with the target's weights; on a Mac again
  after `speed`, as a warm machine is slower.
- `speed`: every method with the budget `auto`: tokens per second, tokens per forward pass, the mean
  time of an iteration by phase, and how far its texts equal plain decoding's. Work that a phase
  leaves running on the device counts towards the next phase that waits for it.
- `exact`: the same in exact mode, or why that is refused.
- on a GPU `iterations`: a forward pass by nodes and context, an iteration by phase for 1, 8 and 32
  texts, by the host's clock and by the device's, and its longest kernels, with random weights in
  the shape of the largest Qwen3 model that fits the GPU.
- on a Mac `prompts`, `passes`, `host`, `plain` and `larger buffers`: a prompt with and without the
  CPU's share, a forward pass by nodes and committed positions, the time in which Python builds a
  pass and a commit, and plain decoding with usual and with larger command buffers.
- on a Mac `memory` and `kernels`: the peak of a text, and which kernels are right and faster than
  MLX's operations, on shapes of common models.
- `tests`: the tests for devices, with tiny models of random weights. Kernels that are not used,
  functions without graphs, texts, logits and losses that differ are failures of tests.

`--draft-bits`, `--kv-bits` and targets in formats of few bits make reports of their own. The tests
need more packages: `pip install '.[cuda,testing]'`, and on a Mac `'.[mlx,testing]'`.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec

from benchmarks.common import Parser, command, require_testing
from benchmarks.random_pair import SHAPES
from benchmarks.report import Part, Report
from treeflash.cli.options import add_model_options, locate_model
from treeflash.errors import ConfigError, TreeflashError
from treeflash.registry import loader


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_number("--minutes", 10, "time for all parts")
    options.add_number("--max-tokens", 128, "new tokens per prompt")
    options.add_number("--repeats", 10, "calls per median")
    sizes = [1, 2, 4, 5, 8, 10, 12, 16, 24, 32, 48, 64]
    options.add_numbers("--sizes", sizes, "nodes of the trees of a Mac's `passes`")
    options.add_numbers("--contexts", [64, 1024, 4096, 16_384], "committed positions of these")
    options.add_argument("--shape", choices=SHAPES, help="of `iterations` (default: what fits)")
    add_model_options(options)
    options.set_defaults(backend=None)
    return options


def choose_backend(name: str | None) -> str:
    """Return the backend of this machine's accelerator: MLX's on a Mac."""
    if name in ("cuda", "mlx"):
        return name
    if name is not None:
        raise ConfigError(f"this report is about the backends cuda and mlx, got --backend {name}")
    if find_spec("mlx") is not None:
        import mlx.core as mx

        if mx.metal.is_available():
            return "mlx"
    return "cuda"


def summary(parts: Sequence[Part]) -> Iterator[str]:
    """Yield a line for each speed of a real pair, so that they stand together, with ratios."""
    rows = [(part.name, row) for part in parts for row in part.tables.get("methods", ())]
    peers = [row for _, row in rows if row["system"] != "treeflash"]
    for name, row in rows:
        speed = row["tokens_per_s"]
        ratios = [f"{row['ratio_to_ar']:.2f}x plain decoding"] if "ratio_to_ar" in row else []
        if ratios:
            ratios += [f"{speed / x['tokens_per_s']:.2f}x {x['system']}" for x in peers[:1]]
        parts_of_line = [f"{speed:.1f} tokens/s", *ratios]
        yield f"{name}: {row['system']}, {row['method']}: {', '.join(parts_of_line)}"


@command(parser)
def main(args: Namespace) -> int:
    """Run all parts, print, write."""
    args.backend = choose_backend(args.backend)
    loader(args.backend)  # its error is clearer than an import's
    require_testing(args.backend)
    parts = import_module(f"benchmarks.{args.backend}_parts")
    try:
        import_module(f"treeflash_{args.backend}.device").choose_device(args.device)
    except TreeflashError as error:
        Report("device_report", args.json, {"device": None, "why": str(error)}, 0)
        raise
    try:
        locate_model(args)
        missing = ""
    except TreeflashError as error:
        missing = str(error)
    facts = {"backend": args.backend, "target": missing or args.target}
    report = Report("device_report", args.json, facts, 60 * args.minutes)
    device = parts.DEVICE(args, report.end, missing)
    print(f"no part starts after {args.minutes} minutes", flush=True)
    started = time.monotonic()
    for number, (name, find) in enumerate(parts.PARTS.items(), 1):
        minutes = (time.monotonic() - started) / 60
        print(f"part {number} of {len(parts.PARTS)}: {name}, at {minutes:.1f} min", flush=True)
        report.run(name, partial(find, device))
    for line in summary(report.parts):
        print(line)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
