"""Diagnose a target and its drafter from the command line: `treeflash doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from treeflash.cli.console import Parser, guarded
from treeflash.cli.options import add_model_options, locate_model, with_device
from treeflash.config import AUTO, DecodeConfig, cache_folder
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.verify_costs import cost_file, model_key
from treeflash.diagnosis import (
    Diagnosis,
    Finding,
    check_facts,
    check_kernels,
    diagnose,
    diagnose_target,
)
from treeflash.drafters.folder import open_folder, read_config
from treeflash.drafters.loading import find_head_format
from treeflash.hub.models import choose_drafter, draft_sources, resolve_drafter, resolve_target
from treeflash.hub.published import drafter_training
from treeflash.registry import default_backend, examine_device
from treeflash.text.prompt import Message, Prompting, read_rows
from treeflash.text.tokenizer import Tokenizer

PROMPTS = (
    "Explain why the sky is blue.",
    "Write a Python function that reverses a string.",
    "A baker sells 24 rolls an hour. How many does she sell in 7 hours?",
    "Write a short letter of thanks to a neighbour.",
)
NO_DRAFTER = "none is known for this target, so copies of the text are drafted (method suffix)"
MTP_HEAD = (
    "an MTP or EAGLE-3 head or an assistant; treeflash evaluate measures it, because only the "
    "settings of block drafters can be checked here"
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
    if args.device_only:
        return _examine_device(args)
    # Folders replace hub ids, which would be resolved at every load.
    if args.drafter in (None, AUTO):
        chosen = choose_drafter(args.target)  # None if copies of the text are the best drafts
        name, folder = chosen.name, chosen.folder
    else:
        name, folder = args.drafter, resolve_drafter(args.drafter, args.target)
    thinking = name is not None and drafter_training(name, args.target).thinking
    sources = [source.name for source in draft_sources(args.target)]
    args.target = str(resolve_target(args.target))

    costs: list[str] = []

    def load(drafter: Path | None) -> Backend:
        model = locate_model(args, drafter=None if drafter is None else str(drafter)).load()
        backend = model.backend
        if not costs:  # of the pair, which is loaded first
            key = model_key(Path(args.target))
            file = cost_file(backend, key, model.loaded, cache_folder() / "costs")
            costs.append(file.describe())
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

        target_config = read_config(Path(args.target))
        if folder is None or find_head_format(open_folder(folder)) is not None:
            diagnosis = diagnose_target(
                load(folder), target_config, NO_DRAFTER if folder is None else MTP_HEAD
            )
        else:
            diagnosis = diagnose(
                load,
                folder,
                Tokenizer.from_folder(args.target),
                prompts,
                prompting=Prompting(raw=args.raw, thinking=args.thinking or thinking),
                max_tokens=args.max_tokens,
                target_config=target_config,
                thorough=args.thorough,
                report=report,
                begin=lambda found: console.print(_report(found), markup=False, soft_wrap=True),
            )
    console.print(f"costs: {costs[0]}", soft_wrap=True, markup=False)
    if args.json:
        print(json.dumps({**diagnosis.to_dict(), "costs": costs[0], "drafters": sources}))
    else:
        print(f"{_report(diagnosis)}\ncan draft, best first: {', '.join(sources)}")
    return 0 if diagnosis.ok else PROBLEM


def _examine_device(args: argparse.Namespace) -> int:
    """Print the backend's report on its device, without a model."""
    name = args.backend or default_backend()
    with Console(stderr=True).status("checking kernels"):
        report = with_device(args, lambda config: examine_device(name, config))
    findings = [*check_facts(report), *check_kernels(report)]
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        print(*map(_line, findings), sep="\n")
    return 0


def make_parser() -> Parser:
    parser = Parser("doctor", "Diagnose a target and its drafter.")
    parser.add_config_option()
    parser.add_argument(
        "--device-only",
        action="store_true",
        help="describe the device and check the backend's kernels on it, without loading a model",
    )
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
    lines = []
    if diagnosis.marginal is not None:
        lines.append(f"agreement by depth: {_percentages(diagnosis.marginal)}")
    if diagnosis.corrected is not None:
        lines.append(f"with the AR head:   {_percentages(diagnosis.corrected)}")
    if diagnosis.evaluation is not None:
        lines.append(f"in its evaluation:  {_percentages(diagnosis.evaluation)}")
    return "\n".join([*lines, *map(_line, diagnosis.findings)])


def _line(finding: Finding) -> str:
    verdict = "ok" if finding.ok else "problem"
    return f"{verdict:<8} {finding.check:<14} {finding.message}"


def _percentages(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.0%}" for share in shares)


if __name__ == "__main__":
    sys.exit(main())
