"""Generate a target's responses to train a drafter on: `python -m treeflash.distill`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from treeflash.cli.exit_status import INTERRUPTED, guarded
from treeflash.cli.options import Parser, add_device_options, with_device
from treeflash.errors import ConfigError
from treeflash.hub.models import resolve_target
from treeflash.text.output_file import locked
from treeflash.text.prompt_file import Row, read_rows
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.distillation import Distillation, DistillConfig
from treeflash.training.mixture import mix
from treeflash.training.self_prompt import self_prompts
from treeflash.training.trainers import trainer


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, let the target answer, and return the exit status."""
    args = _parser().parse_args(argv)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    config = DistillConfig(
        temperatures=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        slots=args.slots,
        seed=args.seed,
    )
    _check(args)
    rows = _rows(args) if args.prompts else []
    with locked(args.output):
        distillation = Distillation.resume(rows, args.output)  # before the model is loaded
        train = trainer(args.backend)
        target = resolve_target(args.target)
        tokenizer = Tokenizer.from_folder(target)
        responder = with_device(args, lambda load: train.responder(target, load))
        try:
            distillation.check(responder, config)
            if args.self_prompt:
                distillation.rows = self_prompts(
                    responder,
                    tokenizer,
                    args.self_prompt,
                    args.output.with_suffix(".prompts.jsonl"),
                    console,
                    slots=args.slots,
                    seed=args.seed,
                )
            distillation.run(responder, tokenizer, config, console)
        except KeyboardInterrupt:
            console.print("interrupted; run the same command again to resume")
            return INTERRUPTED
    console.print(distillation.report())
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("limit", "self_prompt"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"{name.replace('_', '-')} must be 1 or more")
    if args.weights and (args.limit is None or not args.prompts):
        raise ConfigError("--weights divide up the --limit of --prompts; give both")
    if args.limit and not args.prompts:
        raise ConfigError("--limit needs --prompts; --self-prompt gives the number itself")


def _rows(args: argparse.Namespace) -> list[Row]:
    """The rows of all files, mixed."""
    weights = args.weights or [1.0] * len(args.prompts)
    if len(weights) != len(args.prompts) or not all(0 < weight < math.inf for weight in weights):
        raise ConfigError("--weights needs one number above 0 for each file of --prompts")
    return mix([read_rows(path) for path in args.prompts], weights, args.limit, args.seed)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("treeflash.distill", "Generate a target's responses to train a drafter on.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        metavar="FILE.jsonl",
        help="prompts to answer: JSON objects with an id, and turns, a prompt, or messages",
    )
    source.add_argument(
        "--self-prompt",
        type=int,
        metavar="N",
        help="let the target generate N prompts itself, in a file beside the output",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="share of each file of --prompts in the --limit (default: equal shares)",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="number of prompts to answer (default: all)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="write one line per response; prompts already answered in the file are skipped",
    )
    config = DistillConfig()
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=config.temperatures,
        metavar="T",
        help="0 is greedy; several are assigned to the prompts in turn (default: 0)",
    )
    for name, kind, text in (
        ("top_p", float, "sample from the most probable tokens whose probabilities add up to this"),
        ("max_tokens", int, "maximum length of a response"),
        ("max_prompt_tokens", int, "skip longer prompts"),
        ("slots", int, "prompts answered at the same time"),
        ("seed", int, "random seed for mixing and sampling"),
    ):
        default = getattr(config, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=default,
            help=f"{text} (default: {default})",
        )
    add_device_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
