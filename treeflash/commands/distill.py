"""Generate a target's responses to train a drafter on: `treeflash distill`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from treeflash.cli import options as cli
from treeflash.cli.console import Parser, guarded, plain_console
from treeflash.cli.prompt_batch import is_from_chosen
from treeflash.errors import ConfigError
from treeflash.hub.models import resolve_target
from treeflash.interruption import EXIT_INTERRUPTED
from treeflash.text.prompt import Row, read_rows
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.config import given_options
from treeflash.training.distillation import (
    Distillation,
    DistillConfig,
    count_responses,
    is_finished,
    mix,
    response_file,
    self_prompts,
    stored_self_prompts,
)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse(argv)
    console = plain_console()
    config = DistillConfig(**given_options(args, DistillConfig))
    rows = _rows(args, config.seed)
    with response_file(args.output) as file:  # before the model is loaded
        prompts = args.output.with_suffix(".prompts.jsonl")  # of --self-prompt
        if args.self_prompt:
            rows = stored_self_prompts(prompts, args.self_prompt)
        chosen, tokenizer = partial(is_from_chosen, args=args), partial(_tokenizer, args.target)
        if rows and is_finished(file, rows, config, chosen, tokenizer):
            console.print(count_responses(file, rows))
            return 0
        # No drafter is loaded: with many prompts at once, plain decoding keeps the device busy.
        model = cli.load_model(args, drafter=False)
        distillation = Distillation(model, config, file, rows)
        try:
            distillation.check()
            if args.self_prompt:
                distillation.rows = self_prompts(
                    model,
                    args.self_prompt,
                    prompts,
                    console,
                    parallel=config.parallel,
                    seed=config.seed,
                )
            distillation.run(console)
        except KeyboardInterrupt:
            console.print("interrupted; run the same command again to resume")
            return EXIT_INTERRUPTED
    console.print(distillation.report())
    return 0


def _tokenizer(target: str | None) -> Tokenizer:
    return Tokenizer.from_folder(resolve_target(target))


def _rows(args: argparse.Namespace, seed: int) -> list[Row]:
    """Return the rows of all files of --prompts, mixed; none for --self-prompt."""
    for name in ("limit", "self_prompt"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"{name.replace('_', '-')} must be 1 or more")
    if args.weights and (args.limit is None or not args.prompts):
        raise ConfigError("--weights divide up the --limit of --prompts; give both")
    if args.limit and not args.prompts:
        raise ConfigError("--limit needs --prompts; --self-prompt gives the number itself")
    if not args.prompts:
        return []
    weights = args.weights or [1.0] * len(args.prompts)
    if len(weights) != len(args.prompts) or not all(0 < weight < math.inf for weight in weights):
        raise ConfigError("--weights needs one number above 0 for each file of --prompts")
    return mix([read_rows(path) for path in args.prompts], weights, args.limit, seed)


def make_parser() -> Parser:
    parser = Parser("distill", "Generate a target's responses to train a drafter on.")
    parser.add_config_option()
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        metavar="FILE.jsonl",
        help="files of prompts, one JSON object per line, with a prompt, messages, or turns, and "
        "perhaps an id",
    )
    source.add_argument(
        "--self-prompt",
        type=int,
        metavar="N",
        help="let the target generate N prompts itself, and store them in a file beside the output",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="relative share of each file of --prompts in the --limit (default: equal shares)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="number of prompts to answer; all turns of a conversation count once (default: all)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="write one line per response; prompts already answered in the file are skipped",
    )
    cli.add_options(parser, DistillConfig)
    cli.add_device_options(parser)
    return parser
