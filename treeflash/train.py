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

from treeflash.cli.exit_status import INTERRUPTED, guarded
from treeflash.cli.options import Parser, add_device_options, with_device
from treeflash.cli.progress import progress
from treeflash.hub.models import resolve_target
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.config import TrainConfig, read_train_config
from treeflash.training.responses import read_responses
from treeflash.training.trainers import trainer

HELP = {
    "init": "target, random, or the folder of a drafter, which keeps its shape",
    "layers": "number of drafter layers; those that an existing drafter lacks are appended",
    "block_size": "the root and the tokens drafted after it",
    "head": "conditional head: swiglu, linear, markov, selector or none",
    "head_size": "inner size of swiglu, rank of markov and selector",
    "target_layer_ids": "target layers whose outputs the drafter reads",
    "mask_token_id": "token that marks the positions to draft",
    "freeze_backbone": "train only the head",
    "loss": "kl, ce, tv or lk, or a sum such as '0.1 ce + 0.9 tv'",
    "marginal_weight": "weight of the loss without the previous token",
    "corrected_weight": "weight of the loss with the previous token",
    "position_weights": "exponential, or prefix-product: what the accepted length depends on",
    "gamma": "exponential weights are exp(-(d - 1) / gamma) at depth d",
    "on_policy": "share of the blocks that the drafter drafts itself",
    "top_tokens": "tokens of the target's distribution that kl compares one by one",
    "negatives": "estimate the softmax from N random tokens; 0 uses the whole vocabulary",
    "steps": "optimiser steps",
    "sequences": "texts per forward pass and process",
    "anchors": "roots per text",
    "accumulation": "forward passes per step",
    "max_length": "truncate longer texts",
    "learning_rate": "peak learning rate",
    "warmup": "fraction of steps used for warm-up",
    "weight_decay": "weight decay of AdamW",
    "clip": "maximum gradient norm",
    "seed": "random seed",
    "validation_sequences": "responses held out for validation",
    "validate_every": "steps between validations",
    "save_every": "steps between saved states",
    "cache_gb": "disk space for cached target features; 0 recomputes them",
}


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit status."""
    args = _parser().parse_args(argv)
    # Of the processes that `accelerate launch` starts, only the first prints.
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
        if (args.output / "state").exists():
            console.print("interrupted; run the same command again to resume from the last state")
        else:
            console.print("interrupted before the first checkpoint; rerunning starts over")
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
    parser = Parser("treeflash.train", "Train a drafter on the responses of its target.")
    parser.add_argument(
        "--responses",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE.jsonl",
        help="files of treeflash.distill, or JSON lines of messages that end with the assistant's",
    )
    parser.add_argument(
        "--validation",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.jsonl",
        help="responses to validate on (default: --validation-sequences of --responses)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder for the checkpoint, the log, and the state to resume from",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="file with the options below"
    )
    group = parser.add_argument_group("training")
    for field in fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        shown = HELP[field.name]
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
