r"""Measure everything that docs/performance.md shows, and write its tables, in one go.

    python -m benchmarks.performance gsm8k.jsonl math500.jsonl humaneval.jsonl mbpp.jsonl \
        mt_bench.jsonl --device cpu --dtype bfloat16

The sections are measured one after the other, each in its own process, and the results are kept in
docs/performance/results.json. `--only NAME,...` measures some of them again; without prompt sets
the tables are written from the results. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def words(args: Namespace) -> dict[str, list[str]]:
    """Return what the commands of sections are filled in with, and refuse what they cannot do."""
    if "systems" in args.only and args.backend not in BASELINES:
        raise ConfigError(f"no other system has the backend {args.backend!r}; see --only")
    if args.gguf is None and set(OF_FILES) & set(args.only):
        raise ConfigError("a comparison with llama.cpp needs a file: --gguf FILE")
    options = {name: getattr(args, name) for name in ("device", "target", "drafter")}
    files = [x for name, value in options.items() if value for x in (f"--{name}", value)]
    backends, systems, gguf = args.backend, f"{BASELINES.get(args.backend)},treeflash", []
    if args.gguf is not None:
        backends, systems, gguf = f"{backends},gguf", f"{systems},llama.cpp", [str(args.gguf)]
    sets = [str(path.resolve()) for path in args.prompts]
    return {
        "sets": sets,
        "first": sets[:1],
        "backend": [args.backend],
        "backends": [backends],
        "systems": [systems],
        "gguf": gguf,
        "with_gguf": ["--gguf", *gguf] if gguf else [],
        "dtype": [args.dtype],
        "files": files,
        "dequantised": ["--bits", "16"] if args.target is None else [],
        "limit": [str(args.limit)],
        "few": ["--limit", str(args.few), "--max-tokens", str(args.max_tokens)],
        "tokens": [str(args.max_tokens)],
        "memory_tokens": [str(args.memory_tokens)],
        "budgets": [",".join(map(str, args.budgets))],
        "fixed": [",".join(str(size) for size in args.budgets if size != AUTO)],
        "threads": [",".join(map(str, args.threads))],
        "concurrency": [",".join(map(str, args.concurrency))],
    }


def fill_in(command: str, found: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the words of a command, in which a name in braces stands for some words."""
    parts = [re.split(r"[{}]", word) for word in command.split()]
    return [x for part in parts for x in (found[part[1]] if len(part) > 1 else part)]


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
    return [markdown_table(table) for table in tables]


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
        command: the module and the options of its benchmark; see `fill_in`.
        tables: its tables, from the benchmark's results.
    """

    command: str
    tables: Callable[[Row], list[str]]


PAIR = "--backend {backend} --dtype {dtype} {files}"
BESIDE_LLAMA_CPP = (
    "peers {sets} --backends {backends} --methods generate,input-lookup,ar,%s --systems "
    "treeflash,llama.cpp --threads {threads} --device cpu --dtype auto --target {gguf} --gguf "
    "{gguf} {few}"
)
BUDGETS = "decoding.budgets {sets} --backend {backend} {files}%s {few} --budgets {fixed}"
SECTIONS = {
    "systems": Section(
        "peers {sets} --backends {backends} --methods generate,ar,treeflash --systems {systems} "
        "--dtype {dtype} {files} {with_gguf} --limit {limit} --max-tokens {tokens}",
        systems_tables,
    ),
    "gguf": Section(BESIDE_LLAMA_CPP % "treeflash", gguf_tables),
    "gguf-copies": Section(BESIDE_LLAMA_CPP % "suffix", gguf_tables),
    "methods": Section(
        f"decoding.methods {{sets}} {PAIR} {{few}} --budgets {{budgets}}", methods_tables
    ),
    "budgets-float32": Section(BUDGETS % " --dtype float32 {dequantised}", budgets_tables),
    "budgets-bfloat16": Section(BUDGETS % " --dtype bfloat16 {dequantised}", budgets_tables),
    "budgets-own": Section(BUDGETS % "", budgets_tables),
    "throughput": Section(
        f"throughput {{sets}} {PAIR} {{few}} --methods ar,treeflash,generate,batch_generate "
        "--concurrency {concurrency}",
        throughput_tables,
    ),
    "iteration": Section(f"decoding.iteration {{first}} {PAIR} {{few}}", iteration_tables),
    "memory": Section(
        f"decoding.memory {{first}} {PAIR} --max-tokens {{memory_tokens}}", memory_tables
    ),
}
"""The measured sections, by the name of their block on the page."""
OF_FILES = ("gguf", "gguf-copies")
"""The sections that are measured where `--only` names them, each with a file of its own."""


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


@guarded
def main(argv: Sequence[str] | None = None, page: Path = PAGE, parts: Path = UNFINISHED) -> int:
    """Measure, then write the page."""
    args = parser().parse_args(argv)
    for path in args.prompts:
        read_rows(path)  # reports errors before the work
    results = read_results(page)
    found = words(args) if args.prompts else {}
    for name in args.only if args.prompts else ():
        results[name] = measure(name, fill_in(SECTIONS[name].command, found), parts)
        write_results(page, results)
    text = page.read_text(encoding="utf-8")
    page.write_text(render(text, results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
