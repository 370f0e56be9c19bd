"""Train a drafter from the command line: `python -m treeflash.train`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from treeflash.cli.options import INTERRUPTED, Parser, add_device_options, guarded, with_device
from treeflash.cli.progress import progress
from treeflash.hub.models import resolve_target
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.config import TrainConfig, read_train_config
from treeflash.training.responses import read_responses
from treeflash.training.trainers import trainer

EXPLAINED = {
    "init": "target, random, or the folder of a drafter, which keeps its shape",
    "layers": "of the drafter",
    "block_size": "the root and what is drafted after it",
    "head": "swiglu, linear or none",
    "head_size": "inner width of the head",
    "target_layer_ids": "layers of the target that the drafter reads",
    "mask_token_id": "stands for what is to be drafted",
    "freeze_backbone": "train the head alone",
    "loss": "kl or ce",
    "marginal_weight": "of the loss without the previous token",
    "corrected_weight": "of the loss with it",
    "gamma": "depth d counts exp(-(d - 1) / gamma)",
    "top_tokens": "of the target's distribution that kl tells apart",
    "negatives": "random tokens for the rest of the vocabulary; 0 takes all of it",
    "steps": "of the optimiser",
    "sequences": "in a forward",
    "anchors": "roots in a sequence",
    "accumulation": "forwards in a step",
    "max_length": "longer texts are cut",
    "learning_rate": "the highest",
    "warmup": "share of the steps",
    "weight_decay": "of AdamW",
    "clip": "highest norm of the gradient",
    "seed": "of everything random",
    "validation_sequences": "held out",
    "validate_every": "steps",
    "save_every": "steps",
    "cache_gb": "disk for the target's features; 0 runs it anew each time",
}


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit code."""
    args = _parser().parse_args(argv)
    # Of the processes that `accelerate launch` starts, one speaks.
    quiet = os.environ.get("RANK", "0") != "0"
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    names = {field.name for field in fields(TrainConfig)}
    config = read_train_config(args.config, {k: v for k, v in vars(args).items() if k in names})
    train = trainer(args.backend).train
    target = resolve_target(args.target)
    tokenizer = Tokenizer.from_folder(target)
    responses, held_out = (
        [response for path in paths for response in read_responses(path, tokenizer)]
        for paths in (args.responses, args.validation)
    )
    records = with_device(
        args, lambda load: train(target, responses, args.output, config, load, held_out)
    )
    try:
        _show(records, config, console)
    except KeyboardInterrupt:
        last = f"the last state in {args.output}" if (args.output / "state").exists() else "nothing"
        console.print(f"interrupted; the same command goes on from {last}")
        return INTERRUPTED
    console.print(f"{args.output}: trained; pass it as --drafter")
    return 0


def _show(records: Iterator[dict[str, Any]], config: TrainConfig, console: Console) -> None:
    with progress(console) as bar:
        shards = bar.add_task("features", total=None, visible=False)
        steps = bar.add_task("steps", total=config.steps)
        for record in records:
            if "shard" in record:
                done, total = record["shard"], record["shards"]
                bar.update(shards, completed=done, total=total, visible=True)
                continue
            bar.update(steps, completed=record["step"], description=f"loss {record['loss']:.3f}")
            if "validation" in record:
                chains = {k: v for k, v in record["validation"].items() if k.startswith("chain")}
                shown = ", ".join(f"{name} {value:.3f}" for name, value in chains.items())
                console.print(f"step {record['step']}: loss {record['loss']:.3f}, {shown}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("treeflash.train", "Train a drafter for a target on its own answers.")
    parser.add_argument(
        "--responses",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE.jsonl",
        help="of treeflash.distill, or conversations with messages",
    )
    parser.add_argument(
        "--validation",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.jsonl",
        help="of the same kind, to validate on (default: --validation-sequences of the responses)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="of the checkpoint, the log and the state that an interrupted run goes on from",
    )
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="the options below")
    group = parser.add_argument_group("training")
    for field in fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        shown = EXPLAINED[field.name]
        if field.default is not None:
            shown += f" (default: {field.default})"
        if field.type == "bool":
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=shown
            )
        elif field.type == "tuple[int, ...] | None":
            group.add_argument(
                flag, type=int, nargs="+", default=argparse.SUPPRESS, metavar="ID", help=shown
            )
        else:
            kind = {"int": int, "int | None": int, "float": float}.get(str(field.type), str)
            group.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=shown)
    add_device_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
