"""Throughput of many texts at once: treeflash beside the batched generation of other packages.

    python -m benchmarks.throughput gsm8k.jsonl mt_bench.jsonl --backend cuda [--json FILE]

At every concurrency, the prompts of a set are cut into groups of that many, and a group is handed
over at once. Every system and method answers a group in turn before the next group, so that a
disturbance of the machine affects all of them. A group ends with its last text. Decoding is greedy,
from the same token ids to the same stop tokens and limit; the budget is `auto`.

Tokens per second count all new tokens of a group and all its time, the prefill included. The peers
run in the same framework, on the same device and in the same dtype: with `--backend cuda`,
transformers' padded `generate` and its continuous batching, `generate_batch`; with `--backend mlx`,
mlx-lm's `BatchGenerator`. Systems that cannot run are listed with the reason.

At last, the time to the first token of a long prompt is measured without and with a prefix cache
that holds 95 % of it.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.common import Parser, at_least_one, machine, numbers, output_file, show, write_json
from benchmarks.throughput import prefix
from benchmarks.throughput.figures import Record, draw, rows
from benchmarks.throughput.systems import PEERS, SYSTEMS, Prompts, Run, reason, treeflash
from treeflash.cli.exit_status import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import METHODS
from treeflash.errors import ConfigError
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import encode
from treeflash.text.prompt_file import read_rows

WARM_UP, WARM_UP_TOKENS = "warm-up", 8


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("prompts", nargs="+", type=Path, metavar="FILE.jsonl", help="prompt sets")
    options.add_argument(
        "--limit",
        type=at_least_one,
        default=8,
        help="prompts per set, rounded up to a multiple of the concurrency (default: 8)",
    )
    options.add_argument(
        "--max-tokens", type=at_least_one, default=64, help="new tokens per prompt (default: 64)"
    )
    options.add_argument(
        "--concurrency",
        type=numbers,
        default=[1, 2, 4, 8, 16, 32],
        metavar="N,...",
        help="numbers of texts at once (default: 1,2,4,8,16,32)",
    )
    options.add_argument(
        "--methods",
        default=",".join(METHODS),
        help="of treeflash, comma-separated (default: all that the drafter supports)",
    )
    options.add_argument(
        "--systems",
        default=",".join(SYSTEMS),
        help=f"comma-separated, from {', '.join(SYSTEMS)} (default: all)",
    )
    options.add_argument(
        "--long-prompt",
        type=at_least_one,
        default=2000,
        metavar="N",
        help="tokens of the prompt for the prefix cache (default: 2000)",
    )
    options.add_argument("--plot", type=output_file, metavar="FILE.png", help="plot by concurrency")
    add_model_options(options)
    return options


Systems = dict[tuple[str, str], Run]
Skipped = list[dict[str, str]]


def check(args: Any) -> None:
    """Check options before the work.

    Raises:
        ConfigError: one is invalid.
    """
    for option, known in (("systems", SYSTEMS), ("methods", METHODS)):
        values = getattr(args, option).split(",")
        if unknown := [value for value in values if value not in known]:
            raise ConfigError(f"--{option} has no {unknown[0]!r}; choose from {', '.join(known)}")
    if min(args.concurrency) < 1:
        raise ConfigError("--concurrency: every number must be 1 or more")
    if args.plot and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; pip install 'treeflash[report]'")


def groups(prompts: Prompts, limit: int, concurrency: int, name: str) -> list[Prompts]:
    """The first prompts, at least `limit` of them, in groups of equal size.

    Raises:
        ConfigError: the set has too few.
    """
    wanted = -(-limit // concurrency) * concurrency
    if len(prompts) < wanted:
        raise ConfigError(
            f"{name} has {len(prompts)} prompts and {wanted} are needed for groups of "
            f"{concurrency}; lower --limit or --concurrency"
        )
    return [prompts[first : first + concurrency] for first in range(0, wanted, concurrency)]


def load_systems(model: LanguageModel, args: Any) -> tuple[Systems, Skipped]:
    """The chosen systems that run with this backend, and why others do not."""
    systems: Systems = {}
    skipped: Skipped = []
    wanted = args.systems.split(",")
    if "treeflash" in wanted:
        for method in METHODS:
            if method not in args.methods.split(","):
                continue
            if method.startswith("treeflash") and model.backend.head is None:
                skipped.append(skip("treeflash", method, "the drafter has no AR head"))
            else:
                systems["treeflash", method] = treeflash(model, method)
    peer, load = PEERS.get(model.backend.name, (None, None))
    if peer in wanted:
        try:
            systems |= {(peer, method): run for method, run in load(model).items()}
        except Exception as error:  # of another package; the table shows it
            skipped.append(skip(peer, "", reason(error)))
    return systems, skipped


def skip(system: str, method: str, why: str) -> dict[str, str]:
    """A row of the systems that cannot run."""
    return {"system": system, "method": method, "reason": why}


def measure(systems: Systems, sets: dict[str, Prompts], args: Any) -> tuple[list[Record], Skipped]:
    """Every group in every system, in turn; a peer that fails is dropped with its records."""
    records: list[Record] = []
    skipped: Skipped = []

    def answer(group: Prompts, number: int, concurrency: int, name: str, tokens: int) -> None:
        for (system, method), run in tuple(systems.items()):
            try:
                answers = run(group, tokens)
            except Exception as error:  # of another package; the table shows it
                if system == "treeflash":
                    raise
                del systems[system, method]
                records[:] = [x for x in records if (x.system, x.method) != (system, method)]
                skipped.append(skip(system, method, reason(error)))
            else:
                records.append(
                    Record(
                        set_name=name,
                        concurrency=concurrency,
                        system=system,
                        method=method,
                        group=number,
                        answers=answers,
                    )
                )

    for concurrency in args.concurrency:
        of_sets = {name: groups(x, args.limit, concurrency, name) for name, x in sets.items()}
        answer(next(iter(of_sets.values()))[0], 0, concurrency, WARM_UP, WARM_UP_TOKENS)
        records[:] = [x for x in records if x.set_name != WARM_UP]
        for name, of_set in of_sets.items():
            for number, group in enumerate(track(of_set, f"{name}, {concurrency} at once")):
                answer(group, number, concurrency, name, args.max_tokens)
    return records, skipped


def cells(row: dict[str, Any]) -> dict[str, Any]:
    """A row in the narrower form for the terminal."""
    return {
        "texts": row["concurrency"],
        "method": " ".join(dict.fromkeys((row["system"], row["method"]))),
        "tokens/s": row["tokens_per_s"],
        "first s": row["first_token_s"],
        "p95 s": row["first_token_p95_s"],
        "to ar": row["ratio_to_ar"],
        "padded": row["ratio_to_padded"],
        "to one": row["ratio_to_one"],
    }


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    check(args)
    rows_of = {path.stem: read_rows(path) for path in args.prompts}
    for name, of in rows_of.items():  # before the work
        for concurrency in args.concurrency:
            groups([[]] * len(of), args.limit, concurrency, name)
    model = load_model(args)
    backend = model.backend
    sets = {
        name: [encode(model.tokenizer, row.turns[0]) for row in of] for name, of in rows_of.items()
    }
    systems, skipped = load_systems(model, args)
    records, failed = measure(systems, sets, args)
    skipped += failed
    if skipped:
        show("skipped", skipped)
    if not records:
        raise ConfigError("nothing was measured; the reasons are above")
    found = rows(records)
    where = {"backend": backend.name, "device": backend.device, "dtype": backend.dtype}
    shown = [cells(row) for row in found if row["set"] == "mean"]
    show(f"throughput, {' '.join(where.values())}, {args.max_tokens} tokens per prompt", shown)
    all_prompts = [ids for prompts in sets.values() for ids in prompts]
    cached = prefix.measure(model, all_prompts, args.long_prompt)
    show("prefix cache", [cached])
    results = {"max_tokens": args.max_tokens, "rows": found, "skipped": skipped, "prefix": cached}
    write_json(args.json, "throughput", where | results)
    if args.plot:
        draw(found, f"{machine()['cpu']}, {' '.join(where.values())}, mean over sets", args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
