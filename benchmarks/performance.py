r"""Measure everything that docs/performance.md shows, and write its tables, in one go.

    python -m benchmarks.performance gsm8k.jsonl math500.jsonl humaneval.jsonl mbpp.jsonl \
        mt_bench.jsonl --device cpu --dtype bfloat16

The sections are measured one after the other, each in its own process, and the results are kept in
docs/performance/results.json. `--only NAME,...` measures some of them again; without prompt sets
the tables are written from the results. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

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
    options.add_prompts(limit=8, max_tokens=64, nargs="*")
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


def words(args: Namespace) -> dict[str, str]:
    """Return what names in braces stand for in commands, and refuse what these cannot do."""
    if "systems" in args.only and args.backend not in BASELINES:
        raise ConfigError(f"no other system has the backend {args.backend!r}; see --only")
    if args.gguf is None and set(OF_FILES) & set(args.only):
        raise ConfigError("a comparison with llama.cpp needs a file: --gguf FILE")
    lists = {name: ",".join(map(str, x)) for name, x in vars(args).items() if isinstance(x, list)}
    options = {name: getattr(args, name) for name in ("device", "target", "drafter")}
    sets = [str(path.resolve()) for path in args.prompts]
    has_gguf, gguf = args.gguf is not None, shlex.quote(str(args.gguf))
    return {
        **{name: str(value) for name, value in vars(args).items()},
        **lists,
        "sets": shlex.join(sets),
        "first": shlex.join(sets[:1]),
        "backends": args.backend + ",gguf" * has_gguf,
        "systems": f"{BASELINES.get(args.backend)},treeflash" + ",llama.cpp" * has_gguf,
        "gguf": gguf,
        "with_gguf": f"--gguf {gguf}" * has_gguf,
        "files": " ".join(f"--{name} {shlex.quote(x)}" for name, x in options.items() if x),
        "dequantised": "--bits 16" * (args.target is None),
        "fixed": ",".join(str(size) for size in args.budgets if size != AUTO),
    }


def by_set(results: Row, case: str, figure: str, means: Mapping[str, str]) -> str:
    """Format a table of a figure: a line for each case, a column for each set and their mean.

    Args:
        results: their `rows` are all cases of all sets, and then the means.
        case: the columns that name a case.
        figure: the column with the figure.
        means: columns of other figures, of which the table has the means, by their titles.
    """
    lines: dict[tuple[object, ...], Row] = {}
    for row in sorted(results["rows"], key=lambda row: -row.get("threads", 0)):
        columns = {name: row[name] for name in case.split()}
        line = lines.setdefault(tuple(columns.values()), columns)
        line[row["set"]] = row[figure]
        if row["set"] == MEAN:
            line |= {title: row[name] for title, name in means.items()}
    return markdown_table(list(lines.values()))


def as_it_is(results: Row, name: str = "rows") -> str:
    """Format rows of the results."""
    return markdown_table(results[name])


def throughput(results: Row, figure: str, title: str, ratios: Mapping[str, str]) -> str:
    """Format a table of a figure: a line for each number of sequences, a column for each case.

    `ratios` are columns of treeflash's trees, by their titles.
    """
    lines: dict[int, Row] = {}
    for row in results["rows"]:
        if row["set"] == MEAN:
            line = lines.setdefault(row["concurrency"], {"sequences": row["concurrency"]})
            line[f"{row['system']}, {row['method']}, {title}"] = row[figure]
            if row["method"] == "treeflash":
                line |= {name: row[ratio] for name, ratio in ratios.items()}
    return markdown_table(list(lines.values()))


def iteration(results: Row) -> str:
    """Format the milliseconds by phase, and the share outside the passes of both models."""
    phases = ("draft_ms", "tree_ms", "verify_ms", "commit_ms")
    lines = []
    for row in results["rows"]:
        if row["set"] != MEAN:
            line = {name: row[name] for name in ("method", "budget", "nodes", *phases)}
            line["iteration_ms"] = total = sum(row[name] for name in phases)
            line["outside"] = (row["tree_ms"] + row["commit_ms"]) / total
            lines.append({name.replace("_", " "): value for name, value in line.items()})
    return markdown_table(lines)


FEW = "--limit {few} --max-tokens {max_tokens}"
METHODS = f"--backend {{backend}} --dtype {{dtype}} {{files}} {FEW} --budgets"
BESIDE_LLAMA_CPP = (
    "peers {sets} --backends {backends} --methods generate,input-lookup,ar,%s --systems "
    "treeflash,llama.cpp --threads {threads} --device cpu --dtype auto --target {gguf} --gguf "
    f"{{gguf}} {FEW}"
)
BUDGETS = f"decoding.budgets {{sets}} --backend {{backend}} {{files}}%s {FEW} --budgets {{fixed}}"
BESIDE = partial(
    by_set,
    case="threads system method",
    figure="tokens_per_s",
    means={
        "of a processor's second": "tokens_per_processor_s",
        "block efficiency": "block_efficiency",
        "ratio to llama.cpp": "ratio_to_llama_cpp",
    },
)
BY_METHOD = partial(by_set, case="method budget")
RATIOS = {
    "treeflash to ar": "ratio_to_ar",
    "treeflash to generate": "ratio_to_generate",
    "treeflash to one sequence": "ratio_to_one",
}
SECTIONS: dict[str, tuple[str, list[Callable[[Row], str]]]] = {
    "systems": (
        "peers {sets} --backends {backends} --methods generate,ar,treeflash --systems {systems} "
        "--dtype {dtype} {files} {with_gguf} --limit {limit} --max-tokens {max_tokens}",
        [
            partial(
                by_set,
                case="system method budget",
                figure="tokens_per_s",
                means={"ratio to generate": "ratio_to_generate"},
            )
        ],
    ),
    "gguf": (BESIDE_LLAMA_CPP % "treeflash", [BESIDE]),
    "gguf-copies": (BESIDE_LLAMA_CPP % "suffix", [BESIDE]),
    "methods": (
        f"decoding.methods {{sets}} {METHODS} {{budgets}}",
        [
            partial(BY_METHOD, figure="block_efficiency", means={}),
            partial(BY_METHOD, figure="ratio_to_ar", means={"tokens/s": "tokens_per_s"}),
        ],
    ),
    "budgets-float32": (BUDGETS % " --dtype float32 {dequantised}", [as_it_is]),
    "budgets-bfloat16": (BUDGETS % " --dtype bfloat16 {dequantised}", [as_it_is]),
    "budgets-own": (BUDGETS % "", [as_it_is]),
    "throughput": (
        "peers {sets} --backends {backend} --dtype {dtype} {files} "
        f"{FEW} --methods ar,treeflash,generate,batch_generate --concurrency {{concurrency}}",
        [
            partial(throughput, figure="tokens_per_s", title="tokens/s", ratios=RATIOS),
            partial(throughput, figure="first_token_s", title="first token, s", ratios={}),
        ],
    ),
    "iteration": (
        f"decoding.methods {{first}} {METHODS} 16,64 --methods dflash,ddtree,treeflash",
        [iteration],
    ),
    "memory": (
        "decoding.memory {first} --backend {backend} --dtype {dtype} {files} --max-tokens "
        "{memory_tokens}",
        [partial(as_it_is, name="sequence"), partial(as_it_is, name="peak")],
    ),
}
"""The measured sections, by the name of their block on the page: the module and the options of a
benchmark, in which `words` replaces names, and functions that format tables of its results."""
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


def block(tables: Sequence[Callable[[Row], str]], results: Row | None) -> str:
    """Format the tables of a section, with its command and machine."""
    if results is None:
        return NOT_MEASURED
    computer = results["machine"]
    versions = ", ".join(" ".join(pair) for pair in computer["versions"].items())
    device = results.get("device", "cpu")
    processor = f"{computer['cpu']}, {computer['cores']} cores"
    where = f"{computer['date']}, {processor if device == 'cpu' else device}, {versions}:"
    shown = [table(results) for table in tables]
    return "\n\n".join([*shown, where, f"```sh\n{results['command']}\n```"])


def render(page: str, results: dict[str, Row]) -> str:
    """Return the page with new tables.

    Args:
        page: Markdown with a block `<!-- name -->` ... `<!-- end -->` for each section.
        results: by section; a section without results has no tables.
    """
    for name, (_, tables) in SECTIONS.items():
        text = block(tables, results.get(name))
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
        results[name] = measure(name, shlex.split(SECTIONS[name][0].format(**found)), parts)
        write_results(page, results)
    text = page.read_text(encoding="utf-8")
    page.write_text(render(text, results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
