"""Diagnose a target and its drafter from the command line: `treeflash doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from treeflash.cli.console import Parser, guarded
from treeflash.cli.options import add_model_options, locate_model
from treeflash.config import DecodeConfig
from treeflash.decoding.interfaces import Backend
from treeflash.diagnosis import Diagnosis, diagnose
from treeflash.drafters.folder import open_folder, read_config
from treeflash.drafters.loading import find_head_format
from treeflash.errors import UnsupportedModelError
from treeflash.hub.models import draft_sources, drafter_training, resolve_drafter, resolve_target
from treeflash.text.prompt import Message, Prompting, read_rows
from treeflash.text.tokenizer import Tokenizer

PROMPTS = (
    "Explain why the sky is blue.",
    "Write a Python function that reverses a string.",
    "A baker sells 24 rolls an hour. How many does she sell in 7 hours?",
    "Write a short letter of thanks to a neighbour.",
)
MAX_TOKENS = 64
PROBLEM = 1


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, diagnose the pair, and return the exit status.

    0: no problem found; 1: problems found; 2: invalid input; 130: interrupted.
    """
    args = make_parser().parse(argv)
    prompts: list[Sequence[Message]] = [[{"role": "user", "content": text}] for text in PROMPTS]
    if args.prompts is not None:
        prompts = [row.turns[0] for row in read_rows(args.prompts)]
    DecodeConfig(max_tokens=args.max_tokens)  # raises before anything is loaded
    # Folders replace hub ids, which would be resolved at every load.
    folder = resolve_drafter(args.drafter, args.target)
    if find_head_format(open_folder(folder)) is not None:
        raise UnsupportedModelError(
            "doctor checks block drafters, not MTP and EAGLE-3 heads; measure this head with "
            "treeflash evaluate"
        )
    trained = drafter_training(args.drafter, args.target)
    sources = [source.name for source in draft_sources(args.target)]
    args.target = str(resolve_target(args.target))

    def load(drafter: Path) -> Backend:
        changed = {**vars(args), "drafter": str(drafter)}
        backend = locate_model(argparse.Namespace(**changed)).load().backend
        if args.device_map is None:
            args.device = backend.device  # where the next pairs are loaded without a warning
        return backend

    console = Console(stderr=True, highlight=False)
    with console.status("loading the pair") as status:

        def report(number: int, total: int, check: str) -> None:
            line = f"check {number} of {total}: {check}"
            status.update(line)
            if not console.is_terminal:
                console.print(line)

        diagnosis = diagnose(
            load,
            folder,
            Tokenizer.from_folder(args.target),
            prompts,
            prompting=Prompting(raw=args.raw, thinking=args.thinking or trained.thinking),
            max_tokens=args.max_tokens,
            target_config=read_config(Path(args.target)),
            thorough=args.thorough,
            report=report,
            begin=lambda found: console.print(_report(found), markup=False, soft_wrap=True),
        )
    if args.json:
        print(json.dumps({**diagnosis.to_dict(), "drafters": sources}))
    else:
        print(f"{_report(diagnosis)}\ncan draft, best first: {', '.join(sources)}")
    return 0 if diagnosis.ok else PROBLEM


def make_parser() -> Parser:
    parser = Parser("doctor", "Diagnose a target and its drafter.")
    parser.add_config_option()
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="JSON objects with an id, and a prompt, messages, or turns (only the first is used) "
        f"(default: {len(PROMPTS)} built-in prompts)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help=f"maximum number of new tokens per answer (default: {MAX_TOKENS})",
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--raw", action="store_true", help="check for prompts without the chat template"
    )
    way.add_argument(
        "--thinking",
        action="store_true",
        help="check for prompts with thinking on (default: as in the drafter's training)",
    )
    parser.add_argument(
        "--thorough", action="store_true", help="try more tokens as the drafter's mask token"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    return parser


def _report(diagnosis: Diagnosis) -> str:
    lines = [f"agreement by depth: {_percentages(diagnosis.marginal)}"]
    if diagnosis.corrected is not None:
        lines.append(f"with the AR head:   {_percentages(diagnosis.corrected)}")
    for finding in diagnosis.findings:
        verdict = "ok" if finding.ok else "problem"
        lines.append(f"{verdict:<8} {finding.check:<14} {finding.message}")
    return "\n".join(lines)


def _percentages(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.0%}" for share in shares)


if __name__ == "__main__":
    sys.exit(main())
