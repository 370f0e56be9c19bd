"""Measure a drafter from the command line: `python -m treeflash.evaluate`."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from treeflash.cli.exit_status import guarded
from treeflash.cli.options import (
    Parser,
    add_model_options,
    add_parallel_option,
    full_or_number,
    head_rows,
    load_model,
)
from treeflash.config import METHODS, DecodeConfig, SamplingConfig
from treeflash.decoding.interfaces import Backend
from treeflash.errors import ConfigError, PromptError
from treeflash.evaluation.publish import check_files, publish
from treeflash.evaluation.records import MEAN, compute_records
from treeflash.evaluation.run import Case, Evaluation, cases, encode_rows
from treeflash.text.many_texts import AUTO_BYTES, AUTO_TEXTS
from treeflash.text.options import Options, parse_options
from treeflash.text.prompt_file import Row, read_rows

DEFAULT_METHODS = "dflash,ddtree,treeflash,treeflash-chain"
DEFAULT_BUDGETS = "16,64"


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, and return the exit status.

    0: done; 2: invalid input; 130: interrupted. However the run ends, results so far are printed
    and written.
    """
    args = _parser().parse_args(argv)
    options = _options(args)
    rows = _rows(args)
    check_files(args.json, args.report, args.prompts)
    model = load_model(args, {case.method for case in options})
    configs = {case: model.decode_config(own) for case, own in options.items()}
    if args.methods is None and model.backend.head is None:
        configs = {case: config for case, config in configs.items() if not config.uses_head}
    sets = {name: encode_rows(model, own, configs) for name, own in rows.items()}
    evaluation = Evaluation()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        evaluation.run(model.backend, sets, configs, console, args.parallel)
    finally:
        if evaluation.samples:
            records = compute_records(evaluation.samples, args.seed)
            publish(records, _settings(args, model.backend), args.json, args.report)
    if not evaluation.samples:
        raise PromptError("every text ended with its first token, so nothing was drafted")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser("treeflash.evaluate", "Measure a drafter by depth, method and budget.")
    parser.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE.jsonl",
        help="prompt sets, one per file: JSON objects with an id, and turns (only the first is "
        "answered), a prompt, or messages",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use the first N prompts of each set (default: all)"
    )
    parser.add_argument(
        "--methods",
        metavar="A,B",
        help=f"any of {', '.join(METHODS)} (default: those of {DEFAULT_METHODS} that the drafter "
        "supports)",
    )
    parser.add_argument(
        "--budgets",
        default=DEFAULT_BUDGETS,
        metavar="N,M",
        help="nodes of the draft trees, the root included; chains use the largest and stop at the "
        f"end of the block (default: {DEFAULT_BUDGETS})",
    )
    for flag, kind, default, text in (
        ("--max-tokens", int, DecodeConfig.max_tokens, "maximum number of new tokens per prompt"),
        ("--temperature", float, SamplingConfig.temperature, "sampling temperature; 0 is greedy"),
        ("--seed", int, SamplingConfig.seed, "random seed for sampling and for the intervals"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: {default})")
    vocab, rows = DecodeConfig.head_vocab, DecodeConfig.head_rows
    parser.add_argument(
        "--head-vocab",
        type=full_or_number,
        default=vocab,
        metavar="full|N",
        help="number of most probable tokens that the AR head scores, or full: the vocabulary "
        f"(default: {vocab})",
    )
    parser.add_argument(
        "--head-rows",
        type=head_rows,
        default=rows,
        metavar="full|N|auto",
        help="number of previous tokens that it scores them after, full: all, or auto: by the "
        f"budget (default: {rows})",
    )
    add_parallel_option(
        parser,
        1,
        "texts to decode at once, which is faster and in float32 gives the same results; auto: up "
        f"to {AUTO_TEXTS}, fewer if their keys and values would take more than "
        f"{AUTO_BYTES >> 30} GiB (default: 1)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE.html|FILE.png",
        help="write plots and tables, or plots alone, to this file",
    )
    add_model_options(parser)
    return parser


def _options(args: argparse.Namespace) -> dict[Case, Options]:
    """The decoding options of each case."""
    sizes = [size.strip() for size in args.budgets.split(",")]
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise ConfigError(
            f"--budgets takes numbers of 1 or more separated by commas, not {args.budgets!r}"
        )
    budgets = [int(size) for size in sizes]
    if args.max_tokens < 2:
        raise ConfigError("max-tokens must be 2 or more: the prefill yields the first token")
    found: dict[Case, Options] = {}
    methods = DEFAULT_METHODS if args.methods is None else args.methods
    for case in cases(methods.split(","), budgets):
        found[case] = {
            "method": case.method,
            "budget": case.budget,
            "head_vocab": args.head_vocab,
            "head_rows": args.head_rows,
            "max_tokens": args.max_tokens,
            "temperature": args.temperature,
            "seed": args.seed,
        }
        parse_options(found[case])
    return found


def _rows(args: argparse.Namespace) -> dict[str, list[Row]]:
    """The prompts by set."""
    if args.limit is not None and args.limit < 1:
        raise ConfigError("limit must be 1 or more")
    found: dict[str, list[Row]] = {}
    for path in args.prompts:
        if path.stem == MEAN or path.stem in found:
            raise ConfigError(
                f"sets are named after their files, and {path.stem!r} is taken; rename {path}"
            )
        found[path.stem] = read_rows(path)[: args.limit]
    return found


def _settings(args: argparse.Namespace, backend: Backend) -> dict[str, Any]:
    """The settings that the files record."""
    return {
        "date": datetime.date.today().isoformat(),
        "backend": backend.name,
        "device": backend.device,
        "dtype": backend.dtype,
        "target": args.target,
        "drafter": args.drafter,
        "head_vocab": args.head_vocab,
        "head_rows": args.head_rows,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
    }


if __name__ == "__main__":
    sys.exit(main())
