"""Train a drafter from the command line: `treeflash train`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from treeflash.cli.console import Parser, guarded, plain_console
from treeflash.cli.options import add_device_options, add_options, with_device
from treeflash.config import check_writable
from treeflash.hub.models import resolve_target
from treeflash.interruption import EXIT_INTERRUPTED
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.config import TrainConfig, given_options, make_train_config
from treeflash.training.distillation import foreign_responses, read_responses
from treeflash.training.interfaces import show_records, trainer


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse(argv)
    # Of the processes that `accelerate launch` starts, only the first prints.
    quiet = os.environ.get("RANK", "0") != "0"
    console = plain_console(quiet=quiet)
    config = make_train_config(given_options(args, TrainConfig))
    check_writable(args.output, folder=True)
    train = trainer(args.backend).train
    target = resolve_target(args.target)
    tokenizer = Tokenizer.from_folder(target)
    responses, held_out = (
        [response for path in paths for response in read_responses(path, tokenizer)]
        for paths in (args.responses, args.validation)
    )
    for line in foreign_responses([*responses, *held_out], target):
        console.print(line)
    records = with_device(
        args, lambda load: train(target, responses, args.output, config, load, held_out)
    )
    try:
        show_records(records, config, console)
    except KeyboardInterrupt:
        if (args.output / "state").exists():
            console.print("interrupted; run the same command again to resume from the last state")
        else:
            console.print("interrupted before the first checkpoint; rerunning starts over")
        return EXIT_INTERRUPTED
    console.print(f"{args.output}: trained; pass it as --drafter")
    return 0


def make_parser() -> Parser:
    parser = Parser("train", "Train a drafter on the responses of its target.")
    parser.add_config_option()
    parser.add_argument(
        "--responses",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE.jsonl",
        help="files that treeflash distill wrote, or JSON lines with messages that end with the "
        "assistant's",
    )
    parser.add_argument(
        "--validation",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.jsonl",
        help="responses for validation (default: as many of --responses as --validation-sequences)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder for the checkpoint, the log, and the state from which the run can resume",
    )
    add_options(parser.add_argument_group("training"), TrainConfig)
    add_device_options(parser)
    return parser
