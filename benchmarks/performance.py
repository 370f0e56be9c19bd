r"""Everything that docs/performance.md claims, measured in one run and written into that page.

    python benchmarks/performance.py gsm8k.jsonl math500.jsonl humaneval.jsonl mbpp.jsonl \
        mt_bench.jsonl --device cpu --dtype bfloat16

The measurements run one after the other, each a script of this folder in a process of its own, and
leave their results beside the page as JSON. `--only NAME,...` repeats some, `--only ''` renders the
page from the results that are there. Nothing else should run meanwhile.
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
from common import Parser, at_least_one, fast_mlx
from safetensors.numpy import save_file

from treeflash.checkpoints import read_tensors
from treeflash.command import guarded
from treeflash.config import DTYPES
from treeflash.errors import ConfigError
from treeflash.models import resolve_drafter
from treeflash.prompt_file import read_rows

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
RESULTS = HERE.parent / "docs" / "performance"
BUDGETS = "4,8,16,32,64,auto"
Row = dict[str, Any]


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("prompts", nargs="+", type=Path, metavar="FILE.jsonl", help="one a set")
    options.add_argument("--limit", type=at_least_one, default=16, help="prompts a set, bars (16)")
    options.add_argument(
        "--some", type=at_least_one, default=16, help="prompts a set, budgets (16)"
    )
    options.add_argument("--few", type=at_least_one, default=2, help="prompts a set, others (2)")
    options.add_argument("--max-tokens", type=at_least_one, default=128, help="bars (128)")
    options.add_argument("--few-tokens", type=at_least_one, default=64, help="others (64)")
    options.add_argument("--device", help="of what runs on PyTorch (cuda where there is one)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(bfloat16)")
    options.add_argument("--only", metavar="NAME,...", help="measure these alone")
    return options


def commands(args: Any, random_drafter: Path) -> dict[str, list[str]]:
    """What is run, by the name of its results."""
    sets = [str(path) for path in args.prompts]
    device = ["--device", args.device] if args.device else []
    many = ["--limit", str(args.limit), "--max-tokens", str(args.max_tokens)]
    some = ["--limit", str(args.some), "--max-tokens", str(args.few_tokens)]
    few = ["--limit", str(args.few), "--max-tokens", str(args.few_tokens)]
    torch = [*device, "--dtype", args.dtype]
    pair = ["--backend", "cuda", *torch]
    peers, methods = ["peers.py", *sets, *torch], ["methods.py", *sets, *pair]
    heads = [*methods, *few, "--methods", "treeflash", "--budgets", "16,64"]
    ours = ["--methods", "generate,ar,treeflash"]
    plot = ["--plot", str(RESULTS / "peers.png")]
    return {
        "bars": [*peers, *many, *ours, "--backends", "cuda", "--systems", "transformers,treeflash"],
        "bars-mlx": [*peers, *few, *ours, "--backends", "mlx", "--systems", "mlx-lm,treeflash"],
        "peers": [*peers, *few, *plot],
        "budgets": [*methods, *some, "--methods", "ddtree,treeflash", "--budgets", BUDGETS],
        "random": [
            *[*methods, *some, "--methods", "treeflash", "--budgets", "auto"],
            *["--drafter", str(random_drafter)],
        ],
        "head-vocab": [*heads, "--head-vocab", "full,256,512,1024,2048", "--head-rows", "full"],
        "head-rows": [*heads, "--head-rows", "full,16,32,64,128"],
        "head": ["head.py", "--backend", "cuda", *device],
        "head-mlx": ["head.py", "--backend", "mlx", *device],
        "memory": ["memory.py", sets[0], *pair],
        "iteration": ["iteration.py", sets[0], *pair, "--plot", str(RESULTS / "verify.png")],
    }


def write_random_drafter(folder: Path) -> None:
    """Write a drafter that knows nothing: the published one's shape, with random weights."""
    published = resolve_drafter(None, None)
    rng = np.random.default_rng(0)
    (folder / "config.json").write_bytes((published / "config.json").read_bytes())
    random = {
        name: rng.standard_normal(x.shape, np.float32) * 0.02 if x.ndim > 1 else x
        for name, x in read_tensors(published).items()
    }
    save_file(random, folder / "model.safetensors", metadata={"format": "pt"})


def cell(value: Any) -> str:
    """A figure as the page shows it."""
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def table(rows: list[Row]) -> str:
    """Rows in Markdown; the keys of the first are the columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in r.values()] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_set(rows: list[Row], case: tuple[str, ...], figure: str) -> str:
    """One line for each case, with the figure of each set."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    lines: dict[tuple, Row] = {}
    for row in rows:
        name = {key.replace("_", " "): row[key] for key in case}
        line = lines.setdefault(tuple(name.values()), name | dict.fromkeys(sets))
        line[row["set"]] = row[figure]
    return table(list(lines.values()))


def pick(rows: list[Row], *names: str) -> list[Row]:
    """Some columns of rows."""
    return [{name.replace("_", " "): row[name] for name in names} for row in rows]


def mean_speed(rows: list[Row], system: str, method: str) -> float:
    """Tokens a second, the mean over sets."""
    found = [r for r in rows if (r["set"], r["system"], r["method"]) == ("mean", system, method)]
    return float(found[0]["tokens_per_s"])


def bar_rows(bars: list[Row], mlx: list[Row], phases: list[Row]) -> list[Row]:
    """The aims of the project, and what was measured."""
    auto, plain = (mean_speed(bars, "treeflash", method) for method in ("treeflash", "ar"))
    theirs = mean_speed(bars, "transformers", "generate")
    outside = [r["outside"] for r in phases if (r["method"], r["budget"]) == ("treeflash", 64)]
    figures = {
        "`treeflash`, auto, to transformers' `generate`": (2.5, auto / theirs),
        "`treeflash`, auto, to our plain decoding": (1.6, auto / plain),
        "our plain decoding to transformers' `generate`": (1.3, plain / theirs),
        "MLX: `treeflash`, auto, to mlx-lm's `generate`": (
            1.5,
            mean_speed(mlx, "treeflash", "treeflash") / mean_speed(mlx, "mlx-lm", "generate"),
        ),
    }
    rows = [
        {"figure": name, "aim": f"at least {aim}", "measured": value}
        for name, (aim, value) in figures.items()
    ]
    share = {"figure": "time outside forwards, 64 nodes", "aim": "at most 3 %"}
    return [*rows, share | {"measured": f"{100 * outside[0]:.1f} %"}]


def blocks(found: dict[str, Any]) -> dict[str, str]:
    """What stands between the page's marks, by name."""
    iteration = found["iteration"]
    case = ("system", "method", "budget", "backend", "dtype")
    machine = found["iteration"]["machine"]
    versions = ", ".join(" ".join(pair) for pair in machine["versions"].items())
    peers = [r for r in found["peers"]["rows"] if r["set"] == "mean"]
    return {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {versions}.",
        "bars": table(
            bar_rows(found["bars"]["rows"], found["bars-mlx"]["rows"], iteration["phases"])
        ),
        "bars-by-set": by_set(
            found["bars"]["rows"] + found["bars-mlx"]["rows"],
            ("system", "method", "backend"),
            "tokens_per_s",
        ),
        "peers": table(pick(peers, *case, "tokens_per_s", "block_efficiency", "ratio_to_generate")),
        "skipped": table(found["peers"]["skipped"]),
        "budgets": by_set(found["budgets"]["rows"], ("method", "budget"), "ratio_to_ar"),
        "random": by_set(found["random"]["rows"], ("method", "budget"), "ratio_to_ar"),
        **{
            name + suffix: by_set(
                found[name]["rows"], ("method", "budget", name.replace("-", "_")), figure
            )
            for name in ("head-vocab", "head-rows")
            for suffix, figure in (("", "block_efficiency"), ("-speed", "ratio_to_ar"))
        },
        "head": table(found["head"]["rows"] + found["head-mlx"]["rows"]),
        **{name: table(iteration[name]) for name in ("phases", "sampling", "prefill")},
        "memory": table(found["memory"]["rows"]),
    }


def render(page: str, shown: dict[str, str]) -> str:
    """The page with everything between its marks made anew."""
    for name, text in shown.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = page.partition(start)
        if found:
            page = f"{before}{start}{text}\n{end}{rest.partition(end)[2]}"
    return page


@guarded
def main(argv=None) -> int:
    """Measure, then render the page."""
    args = parser().parse_args(argv)
    for path in args.prompts:
        read_rows(path)  # says now what is wrong with it
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_random_drafter(Path(folder))
        runs = commands(args, Path(folder))
        wanted = runs if args.only is None else [name for name in args.only.split(",") if name]
        if unknown := [name for name in wanted if name not in runs]:
            raise ConfigError(f"--only has no {unknown[0]!r}; choose from {', '.join(runs)}")
        for name in wanted:
            script, *options = runs[name]
            print(f"== {name}: python benchmarks/{script} {' '.join(options)}", flush=True)
            command = [sys.executable, HERE / script, *options]
            variables = os.environ | (fast_mlx() if name == "head-mlx" else {})
            results = ["--json", RESULTS / f"{name}.json"]
            code = subprocess.run([*command, *results], env=variables).returncode
            if code:
                return code
    missing = [name for name in runs if not (RESULTS / f"{name}.json").exists()]
    if missing:
        raise ConfigError(f"the page needs {', '.join(missing)} too; leave --only out")
    found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in runs}
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), blocks(found)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
