"""Let a target answer prompts, to train a drafter on: `python -m treeflash.distill`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from treeflash.cli.options import INTERRUPTED, Parser, add_device_options, guarded, with_device
from treeflash.errors import ConfigError
from treeflash.hub.models import resolve_target
from treeflash.text.prompt_file import Row, read_rows
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.distillation import Distillation, DistillConfig, mix
from treeflash.training.self_prompt import self_prompts
from treeflash.training.trainers import trainer


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, let the target answer, and return the exit code."""
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
    for name in ("limit", "self_prompt"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"{name.replace('_', '-')} must be 1 or more")
    if args.weights and (args.limit is None or not args.prompts):
        raise ConfigError("--weights are shares of --limit answers to --prompts; give both")
    if args.limit and not args.prompts:
        raise ConfigError("--limit is of --prompts; --self-prompt says how many it writes")
    # What is wrong with the output is found out before the work, not after.
    distillation = Distillation.resume(_rows(args) if args.prompts else [], args.output)
    train = trainer(args.backend)
    target = resolve_target(args.target)
    tokenizer = Tokenizer.from_folder(target)
    responder = with_device(args, lambda config: train.responder(target, config))
    try:
        if not args.prompts:
            prompts = args.output.with_suffix(".prompts.jsonl")
            distillation.rows = self_prompts(
                responder,
                tokenizer,
                args.self_prompt,
                prompts,
                console,
                slots=args.slots,
                seed=args.seed,
            )
        distillation.run(responder, tokenizer, config, console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from there")
        return INTERRUPTED
    console.print(distillation.report())
    return 0


def _rows(args: argparse.Namespace) -> list[Row]:
    """The prompts of all files, mixed."""
    weights = args.weights or [1.0] * len(args.prompts)
    if len(weights) != len(args.prompts) or not all(0 < weight < math.inf for weight in weights):
        raise ConfigError("--weights needs one number above 0 for each file of --prompts")
    return mix([read_rows(path) for path in args.prompts], weights, args.limit, args.seed)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("treeflash.distill", "Let the target answer prompts, to train a drafter on.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        metavar="FILE.jsonl",
        help="objects with an id, and turns, a prompt, or messages",
    )
    source.add_argument(
        "--self-prompt",
        type=int,
        metavar="N",
        help="let the target write N prompts itself, into a file beside the output",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="shares of the files in --limit answers (default: equal)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="prompts in all (default: every)")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="where answers go, a line each; what it holds already is not answered again",
    )
    config = DistillConfig()
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=config.temperatures,
        metavar="T",
        help="0 is greedy; several are used in turn (default: 0)",
    )
    for name, kind, text in (
        ("top_p", float, "of sampled answers"),
        ("max_tokens", int, "of an answer, at most"),
        ("max_prompt_tokens", int, "longer prompts are left out"),
        ("slots", int, "prompts answered at a time"),
        ("seed", int, "of mixing and sampling"),
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
