"""Measure a drafter from the command line: `treeflash evaluate`."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treeflash.cli import options as cli
from treeflash.cli.console import Parser, guarded, plain_console
from treeflash.config import AUTO_BYTES, AUTO_SEQUENCES, METHODS, DecodeConfig
from treeflash.errors import ConfigError, PromptError
from treeflash.evaluation.records import MEAN, compute_records, prompt_records
from treeflash.evaluation.report import check_files, publish
from treeflash.evaluation.run import (
    Case,
    Evaluation,
    check_max_tokens,
    encode_rows,
    list_cases,
)
from treeflash.language_model import LanguageModel
from treeflash.text.options import Options, parse_options
from treeflash.text.prompt import Row, read_rows

DEFAULT_METHODS = "dflash,ddtree,treeflash,treeflash-chain"
DEFAULT_BUDGETS = "16,64"
DECODE_OPTIONS = ("head_vocab", "head_rows", "calibration", "suffix", "draft_depths", "max_tokens")
OPTIONS = (*DECODE_OPTIONS, "temperature", "seed")


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, and return the exit status.

    0: done; 2: invalid input; 130: interrupted. The results so far are printed and written however
    the run ends.
    """
    args = make_parser().parse(argv)
    if "max_tokens" in args:
        check_max_tokens(args.max_tokens)
    options = case_options(args)
    rows = _rows(args)
    check_files(args.output, args.report, args.prompts)
    model = cli.load_model(args, {case.method for case in options})
    configs = {case: model.decode_config(settings) for case, settings in options.items()}
    if args.methods is None:
        drafter = model.backend.drafter_config
        drafts_blocks = drafter is not None and drafter.has_marginals
        has = {True: model.backend.head is not None, False: drafts_blocks}
        configs = {case: config for case, config in configs.items() if has[config.uses_head]}
    if not configs:
        raise ConfigError(
            "no drafter was loaded, which all default methods need; name one (--drafter), or "
            "methods without one (--methods ar,suffix)"
        )
    sets = {name: encode_rows(model, prompts, configs) for name, prompts in rows.items()}
    config = next(iter(configs.values()))
    evaluation = Evaluation()
    console = plain_console()
    try:
        evaluation.run(model.backend, sets, configs, console, args.parallel)
    finally:
        if evaluation.samples:
            records = compute_records(evaluation.samples, config.sampling.seed)
            records["prompts"] = prompt_records(evaluation.finished, rows)
            target = model.names["target"] or model.backend.name
            settings = _settings(args, model, config)
            publish(records, settings, f"Drafts for {target}", args.output, args.report)
    if not evaluation.samples:
        raise PromptError("every text ended with its first token, so nothing was drafted")
    return 0


def make_parser() -> Parser:
    parser = Parser("evaluate", "Measure a drafter by depth, method and budget.")
    parser.add_config_option()
    parser.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE.jsonl",
        help="sets of prompts, one file per set and one JSON object per line, with a prompt, "
        "messages, or turns (only the first one is answered), and perhaps an id",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use the first N prompts of each set (default: all)"
    )
    parser.add_argument(
        "--methods",
        metavar="A,B",
        help=f"methods to measure, out of {', '.join(METHODS)} (default: the methods that the "
        f"drafter supports of {DEFAULT_METHODS})",
    )
    parser.add_argument(
        "--budgets",
        metavar="N,M",
        help="numbers of nodes in the draft trees, including their roots; chains use the largest "
        f"number and stop at the end of the block (default: {DEFAULT_BUDGETS})",
    )
    cli.add_parallel_option(
        parser,
        1,
        "sequences to decode at once, which is faster and in float32 gives the same results; auto: "
        f"up to {AUTO_SEQUENCES}, fewer if they would need more than {AUTO_BYTES >> 30} GiB of KV "
        "cache (default: 1)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write the results to this file"
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE.html|FILE.png",
        help="write plots and tables (HTML), or only plots (PNG), to this file",
    )
    cli.add_decode_options(parser, OPTIONS, {"suffix": "off"})
    cli.add_model_options(parser)
    return parser


def case_options(args: argparse.Namespace) -> dict[Case, Options]:
    budgets = DEFAULT_BUDGETS if args.budgets is None else args.budgets
    sizes = [size.strip() for size in budgets.split(",")]
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise ConfigError(
            f"--budgets takes numbers of 1 or more separated by commas, not {budgets!r}"
        )
    # Without copies of the text, the figures are the drafter's own.
    shared: Options = {"suffix": False, **cli.decode_options(args)}
    methods = DEFAULT_METHODS if args.methods is None else args.methods
    options: dict[Case, Options] = {}
    names = (name.strip() for name in methods.split(","))
    for case in list_cases(names, map(int, sizes)):
        options[case] = {**shared, "method": case.method, "budget": case.budget}
        parse_options(options[case])
    return options


def _rows(args: argparse.Namespace) -> dict[str, list[Row]]:
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be 1 or more, got {args.limit}")
    sets: dict[str, list[Row]] = {}
    for path in args.prompts:
        if path.stem == MEAN or path.stem in sets:
            raise ConfigError(
                f"sets are named after their files, and {path.stem!r} is taken; rename {path}"
            )
        sets[path.stem] = read_rows(path)[: args.limit]
    return sets


def _settings(
    args: argparse.Namespace, model: LanguageModel, config: DecodeConfig
) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "backend": model.backend.name,
        "device": model.backend.device,
        "dtype": model.backend.dtype,
        "target": args.target or model.names["target"],
        "drafter": args.drafter or model.names["drafter"],
        **{name: getattr(config, name) for name in DECODE_OPTIONS},
        "temperature": config.sampling.temperature,
        "seed": config.sampling.seed,
    }
