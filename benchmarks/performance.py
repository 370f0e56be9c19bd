r"""Measure everything that docs/performance.md shows, in one run, and update the page.

    python -m benchmarks.performance gsm8k.jsonl math500.jsonl humaneval.jsonl mbpp.jsonl \
        mt_bench.jsonl --device cpu --dtype bfloat16

The measurements run one after the other, each in its own process, and write their results beside
the page as JSON. `--only NAME,...` repeats some of them; `--only ''` renders the page from the
existing results. Nothing else should run on the machine meanwhile. The page shows the section on
throughput once that was measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.common import Parser, at_least_one, fast_mlx
from benchmarks.page import blocks, render
from benchmarks.throughput import section
from treeflash.cli.exit_status import guarded
from treeflash.config import DTYPES
from treeflash.decoding.verify_costs import SIZES
from treeflash.drafters.folder import read_tensors
from treeflash.errors import ConfigError
from treeflash.hub.models import resolve_drafter, resolve_target
from treeflash.text.prompt_file import read_rows

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
RESULTS = DOCS / "performance"
BUDGETS = "4,8,16,32,64,auto"
QUANTISED_TARGET = "SmolLM2-135M-Instruct-4bit"
ON_MLX = ("head-mlx", "iteration-mlx", "quantised", "throughput-mlx")
THROUGHPUT = ("throughput", "throughput-mlx")
"""Measurements that the page can do without."""
MOST_NODES = 64  # of a forward pass on MLX


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("prompts", nargs="+", type=Path, metavar="FILE.jsonl", help="prompt sets")
    options.add_argument(
        "--limit",
        type=at_least_one,
        default=16,
        help="prompts per set for goals and budgets (default: 16)",
    )
    options.add_argument(
        "--some", type=at_least_one, default=8, help="prompts per set for random (default: 8)"
    )
    options.add_argument(
        "--few", type=at_least_one, default=2, help="prompts per set for the rest (default: 2)"
    )
    options.add_argument(
        "--max-tokens", type=at_least_one, default=128, help="per prompt, for goals (default: 128)"
    )
    options.add_argument(
        "--few-tokens", type=at_least_one, default=64, help="per prompt, for the rest (default: 64)"
    )
    options.add_argument("--device", help="for PyTorch (default: cuda if available)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: bfloat16)")
    options.add_argument("--only", metavar="NAME,...", help="measure only these")
    return options


def commands(args: Any, random_drafter: Path, quantised: Path) -> dict[str, list[str]]:
    """The module and options of each measurement, by the name of its results."""
    sets = [str(path) for path in args.prompts]
    device = ["--device", args.device] if args.device else []
    many = ["--limit", str(args.limit), "--max-tokens", str(args.max_tokens)]
    short = ["--max-tokens", str(args.few_tokens)]
    few = ["--limit", str(args.few), *short]
    torch = [*device, "--dtype", args.dtype]
    pair = ["--backend", "cuda", *torch]
    peers, methods = ["peers", *sets, *torch], ["decoding.methods", *sets, *pair]
    ours = ["--methods", "generate,ar,treeflash"]
    plot = ["--plot", str(RESULTS / "peers.png")]
    # Other types are slow on MLX's CPU backend.
    mlx_dtype = "float32" if sys.platform == "linux" else args.dtype
    mlx = [
        *[
            "components.iteration",
            sets[0],
            "--backend",
            "mlx",
            "--dtype",
            mlx_dtype,
            "--contexts",
            "64",
        ],
        *["--sizes", ",".join(str(size) for size in SIZES if size <= MOST_NODES)],
        *["--repeats", "3", "--limit", str(args.few)],
    ]
    return {
        "goals": [
            *peers,
            *many,
            *ours,
            "--backends",
            "cuda",
            "--systems",
            "transformers,treeflash",
        ],
        "goals-mlx": [*peers, *few, *ours, "--backends", "mlx", "--systems", "mlx-lm,treeflash"],
        "peers": [*peers, *few, *plot],
        "budgets": [
            *[*methods, *short, "--limit", str(args.limit)],
            *["--methods", "ddtree,treeflash", "--budgets", BUDGETS],
        ],
        "random": [
            *[*methods, *short, "--limit", str(args.some)],
            *["--methods", "treeflash", "--budgets", "auto", "--drafter", str(random_drafter)],
        ],
        "replay": ["decoding.replay", *sets, *pair],
        "window": ["decoding.window", *sets[:3], *pair, "--max-tokens", "48"],
        "head": ["components.ar_head", "--backend", "cuda", *device],
        "head-mlx": ["components.ar_head", "--backend", "mlx"],
        "memory": ["decoding.memory", sets[0], *pair],
        "iteration": [
            *["components.iteration", sets[0], *pair, "--limit", "6"],
            *["--plot", str(RESULTS / "verify.png")],
        ],
        "iteration-mlx": [*mlx, "--parts", "phases,verify"],
        "quantised": [*mlx, "--parts", "verify", "--target", str(quantised)],
        "throughput": [
            *["throughput", *sets, *pair, *short, "--limit", str(args.some)],
            *["--plot", str(RESULTS / "throughput.png")],
        ],
        "throughput-mlx": [
            *["throughput", *sets, "--backend", "mlx", "--dtype", mlx_dtype, *short],
            *["--limit", str(args.few), "--concurrency", "1,2,4,8"],
        ],
    }


def write_random_drafter(folder: Path) -> None:
    """Write a drafter of random weights in the shape of the published one."""
    folder.mkdir()
    published = resolve_drafter(None, None)
    rng = np.random.default_rng(0)
    (folder / "config.json").write_bytes((published / "config.json").read_bytes())
    random = {
        name: rng.standard_normal(x.shape, np.float32) * 0.02 if x.ndim > 1 else x
        for name, x in read_tensors(published).items()
    }
    save_file(random, folder / "model.safetensors", metadata={"format": "pt"})


def write_quantised_target(folder: Path) -> None:
    """Write the default target in 4 bits, as mlx-lm converts it."""
    command = [sys.executable, "-m", "mlx_lm", "convert", "-q", "--mlx-path", folder]
    subprocess.run([*command, "--hf-path", resolve_target(None)], check=True)


def write_page(found: dict[str, Any]) -> None:
    """Update the page from results, by name."""
    page, shown = PAGE.read_text(encoding="utf-8"), blocks(found)
    if "throughput" in found:
        page = section.with_section(page)
        shown |= section.blocks(found)
    PAGE.write_text(render(page, shown), encoding="utf-8")


@guarded
def main(argv=None) -> int:
    """Measure, then render the page."""
    args = parser().parse_args(argv)
    for path in args.prompts:
        read_rows(path)  # reports errors before the work
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        random_drafter, quantised = Path(folder, "random"), Path(folder, QUANTISED_TARGET)
        runs = commands(args, random_drafter, quantised)
        wanted = runs if args.only is None else [name for name in args.only.split(",") if name]
        if unknown := [name for name in wanted if name not in runs]:
            raise ConfigError(f"--only has no {unknown[0]!r}; choose from {', '.join(runs)}")
        if "random" in wanted:
            write_random_drafter(random_drafter)
        if "quantised" in wanted:
            write_quantised_target(quantised)
        for name in wanted:
            module, *options = runs[name]
            print(f"== {name}: python -m benchmarks.{module} {' '.join(options)}", flush=True)
            command = [sys.executable, "-m", f"benchmarks.{module}", *options]
            variables = os.environ | (fast_mlx() if name in ON_MLX else {})
            json_file = ["--json", RESULTS / f"{name}.json"]
            code = subprocess.run([*command, *json_file], env=variables).returncode
            if code:
                return code
    results = {name: RESULTS / f"{name}.json" for name in runs}
    missing = [name for name in runs if name not in THROUGHPUT and not results[name].exists()]
    if missing:
        raise ConfigError(f"the page also needs {', '.join(missing)}; omit --only")
    found = {name: json.loads(file.read_text()) for name, file in results.items() if file.exists()}
    write_page(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
