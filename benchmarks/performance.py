r"""Measure everything that docs/performance.md shows, and write its tables, in one go.

    python -m benchmarks.performance gsm8k.jsonl math500.jsonl humaneval.jsonl mbpp.jsonl \
        mt_bench.jsonl --device cpu --dtype bfloat16

The sections are measured one after the other, each in its own process, and the results are kept in
docs/performance/results.json. `--only NAME,...` measures some of them again; without prompt sets
the tables are written from the results. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import ROOT, Parser, Row, markdown_table
from benchmarks.peers.system import BASELINES
from treeflash.cli.console import guarded
from treeflash.config import AUTO, DTYPES
from treeflash.errors import ConfigError
from treeflash.evaluation.records import MEAN
from treeflash.text.prompt import read_rows

PAGE = ROOT / "docs" / "performance.md"
UNFINISHED = Path(tempfile.gettempdir(), "treeflash-performance")
"""Folder of the files of benchmarks that have not ended."""
NOT_MEASURED = "Not measured yet."


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__, json=False)
    options.add_prompts(limit=8, max_tokens=64, required=False)
    options.add_number("--few", 4, "prompts per set for all sections but the first")
    options.add_budgets([8, 16, 32, 64, AUTO], "budgets of tree methods")
    options.add_numbers("--concurrency", [1, 2, 4, 8, 16, 32], "sequences at once")
    options.add_number("--memory-tokens", 500, "new tokens of each sequence for memory")
    options.add_argument("--backend", default="cuda", help="(default: cuda)")
    options.add_argument("--device", help="(default: the backend's fastest)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: bfloat16)")
    options.add_argument("--gguf", type=Path, metavar="FILE", help="the target for llama.cpp")
    options.add_numbers("--threads", [2, 1], "threads beside llama.cpp")
    options.add_argument("--target", metavar="FOLDER_OR_ID", help="(default: the bundled pair)")
    options.add_argument("--drafter", metavar="FOLDER_OR_ID", help="(default: the published one)")
    usual = [name for name in SECTIONS if name not in OF_FILES]
    options.add_names("--only", SECTIONS, "sections to measure", usual)
    return options


def systems_command(args: Namespace) -> list[str]:
    """Return the command for the speed of `generate`, plain decoding and drafting, by set."""
    if args.backend not in BASELINES:
        raise ConfigError(f"no other system has the backend {args.backend!r}; see --only")
    backends, systems = args.backend, f"{BASELINES[args.backend]},treeflash"
    file: list[str] = []
    if args.gguf is not None:
        backends, systems = f"{backends},gguf", f"{systems},llama.cpp"
        file = ["--gguf", str(args.gguf)]
    return [
        *["peers", *args.sets, "--backends", backends, "--methods", "generate,ar,treeflash"],
        *["--systems", systems, *args.model, *file],
        *["--limit", str(args.limit), "--max-tokens", str(args.max_tokens)],
    ]


def gguf_command(args: Namespace, method: str) -> list[str]:
    """Return the command for the speed of a GGUF file beside llama.cpp, by number of threads.

    `method` is how treeflash drafts for it.
    """
    if args.gguf is None:
        raise ConfigError("a comparison with llama.cpp needs a file: --gguf FILE")
    return [
        *["peers", *args.sets, "--backends", f"{args.backend},gguf"],
        *["--methods", f"generate,input-lookup,ar,{method}"],
        *["--systems", "treeflash,llama.cpp", "--threads", ",".join(map(str, args.threads))],
        *["--device", "cpu", "--dtype", AUTO, "--target", str(args.gguf), "--gguf", str(args.gguf)],
        *["--limit", str(args.few), "--max-tokens", str(args.max_tokens)],
    ]


def methods_command(args: Namespace) -> list[str]:
    """Return the command for block efficiency and speed by method and budget."""
    budgets = ",".join(map(str, args.budgets))
    return ["decoding.methods", *args.sets, *args.pair, *args.amount, "--budgets", budgets]


def budgets_command(dtype: str | None, args: Namespace) -> list[str]:
    """Return the command for the speed of `auto` relative to fixed sizes.

    The weights are dequantised to the dtype; None leaves the bundled target in its own bits.
    """
    fixed = ",".join(str(size) for size in args.budgets if size != AUTO)
    loaded = [] if dtype is None else ["--dtype", dtype]
    if dtype is not None and args.target is None:
        loaded += ["--bits", "16"]
    model = ["--backend", args.backend, *args.files, *loaded]
    return ["decoding.budgets", *args.sets, *model, *args.amount, "--budgets", fixed]


def throughput_command(args: Namespace) -> list[str]:
    """Return the command for throughput by number of sequences."""
    return [
        *["throughput", *args.sets, *args.pair, *args.amount],
        *["--methods", "ar,treeflash,generate,batch_generate"],
        *["--concurrency", ",".join(map(str, args.concurrency))],
    ]


def iteration_command(args: Namespace) -> list[str]:
    """Return the command for the time of an iteration by phase."""
    return [
        *["decoding.iteration", *args.sets[:1], *args.pair, *args.amount],
        *["--parts", "phases"],
    ]


def memory_command(args: Namespace) -> list[str]:
    """Return the command for memory."""
    tokens = ["--max-tokens", str(args.memory_tokens)]
    return ["decoding.memory", *args.sets[:1], *args.pair, *tokens]


def by_set(rows: Iterable[Row], case: Sequence[str], figure: str) -> list[Row]:
    """Format a line for each case, with a column of the figure for each set and their mean."""
    lines: dict[tuple[object, ...], Row] = {}
    for row in rows:
        columns = {name: row[name] for name in case}
        line = lines.setdefault(tuple(columns.values()), columns)
        line[row["set"]] = row[figure]
    return list(lines.values())


def systems_tables(results: Row) -> list[str]:
    """Build the table of tokens per second by set, with the mean ratio to `generate`."""
    case = ("system", "method", "budget")
    lines = by_set(results["rows"], case, "tokens_per_s")
    means = [row for row in results["rows"] if row["set"] == MEAN]
    for line, row in zip(lines, means, strict=True):
        line["ratio to generate"] = row["ratio_to_generate"]
    return [markdown_table(lines)]


def gguf_tables(results: Row) -> list[str]:
    """Build the table of tokens per second by set, and of what they have to llama.cpp's."""
    lines = by_set(results["rows"], ("threads", "system", "method"), "tokens_per_s")
    means = [row for row in results["rows"] if row["set"] == MEAN]
    for line, row in zip(lines, means, strict=True):
        line["of a processor's second"] = row["tokens_per_processor_s"]
        line["block efficiency"] = row["block_efficiency"]
        line["ratio to llama.cpp"] = row["ratio_to_llama_cpp"]
    lines.sort(key=lambda line: -line["threads"])
    return [markdown_table(lines)]


def methods_tables(results: Row) -> list[str]:
    """Build tables of block efficiency and of speed relative to plain decoding."""
    case = ("method", "budget")
    means = [row for row in results["rows"] if row["set"] == MEAN]
    tables = [by_set(results["rows"], case, x) for x in ("block_efficiency", "ratio_to_ar")]
    for line, row in zip(tables[1], means, strict=True):
        line["tokens/s"] = row["tokens_per_s"]
    auto = [
        {
            "method": row["method"],
            "set": row["set"],
            "fastest fixed budget": row["best"],
            "auto, relative to it": _change(row["auto_to_best"]),
            "95 % interval": f"{_change(row['low'])} to {_change(row['high'])}",
        }
        for row in results["auto"]
    ]
    return [markdown_table(table) for table in (*tables, auto) if table]


def budgets_tables(results: Row) -> list[str]:
    """Build the table of tokens per second by set."""
    return [markdown_table(results["rows"])]


def throughput_tables(results: Row) -> list[str]:
    """Build tables of tokens per second and time to the first token, by sequences."""
    speeds: dict[int, Row] = {}
    waits: dict[int, Row] = {}
    for row in results["rows"]:
        if row["set"] != MEAN:
            continue
        name, count = f"{row['system']}, {row['method']}", row["concurrency"]
        speed, wait = (lines.setdefault(count, {"sequences": count}) for lines in (speeds, waits))
        speed[f"{name}, tokens/s"] = row["tokens_per_s"]
        wait[f"{name}, first token, s"] = row["first_token_s"]
        if row["method"] == "treeflash":
            speed |= {
                "treeflash to ar": row["ratio_to_ar"],
                "treeflash to generate": row["ratio_to_padded"],
                "treeflash to one sequence": row["ratio_to_one"],
            }
    return [markdown_table(list(lines.values())) for lines in (speeds, waits)]


def iteration_tables(results: Row) -> list[str]:
    """Build the table of milliseconds by phase."""
    rows = [{name.replace("_", " "): row[name] for name in row} for row in results["phases"]]
    return [markdown_table(rows)]


def memory_tables(results: Row) -> list[str]:
    """Build the table of a sequence's memory, and of the peak."""
    return [markdown_table(results["sequence"]), markdown_table(results["peak"])]


class Section(NamedTuple):
    """A section of the page.

    Attributes:
        command: the module and the options of its benchmark.
        tables: its tables, from the benchmark's results.
    """

    command: Callable[[Namespace], list[str]]
    tables: Callable[[Row], list[str]]


SECTIONS = {
    "systems": Section(systems_command, systems_tables),
    "gguf": Section(partial(gguf_command, method="treeflash"), gguf_tables),
    "gguf-copies": Section(partial(gguf_command, method="suffix"), gguf_tables),
    "methods": Section(methods_command, methods_tables),
    "budgets-float32": Section(partial(budgets_command, "float32"), budgets_tables),
    "budgets-bfloat16": Section(partial(budgets_command, "bfloat16"), budgets_tables),
    "budgets-own": Section(partial(budgets_command, None), budgets_tables),
    "throughput": Section(throughput_command, throughput_tables),
    "iteration": Section(iteration_command, iteration_tables),
    "memory": Section(memory_command, memory_tables),
}
"""The measured sections, by the name of their block on the page."""


OF_FILES = ("gguf", "gguf-copies")
"""The sections that are measured where `--only` names them, each with a file of its own."""


def prepare(args: Namespace) -> None:
    """Add the options that several benchmarks share."""
    args.sets = [str(path.resolve()) for path in args.prompts]
    args.files = []
    for option in ("device", "target", "drafter"):
        if value := getattr(args, option):
            args.files += [f"--{option}", value]
    args.model = ["--dtype", args.dtype, *args.files]
    args.pair = ["--backend", args.backend, *args.model]
    args.amount = ["--limit", str(args.few), "--max-tokens", str(args.max_tokens)]


def measure(name: str, command: Sequence[str], parts: Path) -> Row:
    """Return the results of a section's benchmark, with its command.

    The benchmark keeps what it has found in the folder `parts` until it ends.
    """
    files = ".jsonl", ".gguf"
    shown = " ".join(Path(word).name if word.endswith(files) else word for word in command)
    shown = f"python -m benchmarks.{shown}"
    print(f"== {shown}", flush=True)
    parts.mkdir(exist_ok=True)
    file = parts / f"{name}.json"
    module, *options = command
    run = [sys.executable, "-m", f"benchmarks.{module}", *options, "--json", str(file)]
    code = subprocess.run(run, cwd=ROOT, check=False).returncode
    if code:
        raise ConfigError(f"`{shown}` failed with exit status {code}")
    results = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return {"command": shown, **results}


def block(section: Section, results: Row | None) -> str:
    """Format the tables of a section, with its command and machine."""
    if results is None:
        return NOT_MEASURED
    computer = results["machine"]
    versions = ", ".join(" ".join(pair) for pair in computer["versions"].items())
    device = results.get("device", "cpu")
    processor = f"{computer['cpu']}, {computer['cores']} cores"
    where = f"{computer['date']}, {processor if device == 'cpu' else device}, {versions}:"
    return "\n\n".join([*section.tables(results), where, f"```sh\n{results['command']}\n```"])


def render(page: str, results: dict[str, Row]) -> str:
    """Return the page with new tables.

    Args:
        page: Markdown with a block `<!-- name -->` ... `<!-- end -->` for each section.
        results: by section; a section without results has no tables.
    """
    for name, section in SECTIONS.items():
        text = block(section, results.get(name))
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, mark, rest = page.partition(start)
        if not mark:
            raise ConfigError(f"the page has no block {name}; add {start.strip()} and {end}")
        page = f"{before}{start}{text}\n{end}{rest.partition(end)[2]}"
    return page


def results_of(page: Path) -> Path:
    """Return the file that has the results of a page."""
    return page.with_suffix("") / "results.json"


def read_results(page: Path = PAGE) -> dict[str, Row]:
    """Read the results of earlier runs, by section."""
    file = results_of(page)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_results(page: Path, results: dict[str, Row]) -> None:
    """Keep results for the next call."""
    file = results_of(page)
    file.parent.mkdir(exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(x)}" for name, x in results.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _change(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


@guarded
def main(argv: Sequence[str] | None = None, page: Path = PAGE, parts: Path = UNFINISHED) -> int:
    """Measure, then write the page."""
    args = parser().parse_args(argv)
    for path in args.prompts:
        read_rows(path)  # reports errors before the work
    prepare(args)
    results = read_results(page)
    for name in args.only if args.prompts else ():
        results[name] = measure(name, SECTIONS[name].command(args), parts)
        write_results(page, results)
    text = page.read_text(encoding="utf-8")
    page.write_text(render(text, results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
