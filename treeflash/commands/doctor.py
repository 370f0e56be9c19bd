"""Diagnose a target and its drafter from the command line: `treeflash doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from treeflash.cli.console import Parser, guarded, plain_console
from treeflash.cli.options import add_model_options, locate_model, with_device
from treeflash.config import DecodeConfig, cache_folder
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
from treeflash.hub.models import draft_sources
from treeflash.language_model import LanguageModel, LocatedPair
from treeflash.registry import default_backend, drafter_replacer, examine_device
from treeflash.text.prompt import Message, Prompting, read_rows
from treeflash.text.tokenizer import Tokenizer

PROMPTS = (
    "Explain why the sky is blue.",
    "Write a Python function that reverses a string.",
    "A baker sells 24 rolls an hour. How many does she sell in 7 hours?",
    "Write a short letter of thanks to a neighbour.",
)
NO_DRAFTER = {
    "suffix": "none is known for this target, so copies of the text are drafted (method suffix)",
    "ar": "none is known for this target, which runs no draft trees, so nothing is drafted",
}
"""By the method that is left."""
MTP_HEAD = (
    "an MTP or EAGLE-3 head or an assistant; treeflash evaluate measures it, because only the "
    "settings of block drafters can be checked here"
)
DIAGNOSIS_TOKENS = 64
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
    pair = locate_model(args)
    sources = [source.name for source in draft_sources(args.target)]
    args.target = str(pair.target)  # a hub id would be resolved at every load
    loader = PairLoader(pair, args)
    console = plain_console(soft_wrap=False)
    with console.status("loading the pair") as status:

        def report(number: int, total: int, check: str) -> None:
            line = f"check {number} of {total}: {check}"
            status.update(line)
            if not console.is_terminal:
                console.print(line)

        told: list[str] = []

        def begin(found: Diagnosis) -> None:
            console.print("\n".join(lines := _report(found)), soft_wrap=True)
            if console.is_terminal and sys.stdout.isatty():
                told.extend(lines)  # a reader sees standard error above standard output

        target_config = read_config(pair.target)
        if pair.drafter is None:
            model = loader.load(None)
            left = NO_DRAFTER[model.best_method]
            diagnosis = diagnose_target(model.backend, target_config, left)
        elif find_head_format(open_folder(pair.drafter)) is not None:
            diagnosis = diagnose_target(loader.load(pair.drafter).backend, target_config, MTP_HEAD)
        else:
            diagnosis = diagnose(
                loader.draft_with,
                pair.drafter,
                Tokenizer.from_folder(pair.target),
                prompts,
                prompting=Prompting(raw=args.raw, thinking=args.thinking or pair.thinking),
                max_tokens=args.max_tokens,
                target_config=target_config,
                thorough=args.thorough,
                report=report,
                begin=begin,
            )
    console.print(f"costs: {loader.costs}", soft_wrap=True)
    if args.json:
        print(json.dumps({**diagnosis.to_dict(), "costs": loader.costs, "drafters": sources}))
    else:
        lines = [line for line in _report(diagnosis) if line not in told]
        print(*lines, f"can draft, best first: {', '.join(sources)}", sep="\n")
    return 0 if diagnosis.ok else PROBLEM


class PairLoader:
    """Loads a target with one drafter after another, first with the one of the located pair.

    Attributes:
        costs: where the costs of forward passes come from; empty until a model is loaded.
    """

    def __init__(self, pair: LocatedPair, args: argparse.Namespace) -> None:
        self.costs = ""
        self._pair, self._args = pair, args
        self._replace_drafter: Callable[[Path], Backend] | None = None

    def load(self, drafter: Path | None) -> LanguageModel:
        pair, args = self._pair, self._args
        located = pair if drafter == pair.drafter else locate_model(args, drafter=str(drafter))
        # A drafter that was chosen and fails is an error, as one that was named.
        model = replace(located, automatic=drafter is None).load()
        if not self.costs:
            key, kept = model_key(pair.target), cache_folder() / "costs"
            self.costs = cost_file(model.backend, key, model.loaded, kept).describe()
            if not args.draft_window:
                self._replace_drafter = drafter_replacer(pair.loader, model.backend)
        if args.device_map is None:
            args.device = model.backend.device  # where others are loaded without a warning
        return model

    def draft_with(self, drafter: Path) -> Backend:
        """Load a drafter; its target is loaded once, if the backend can go on using it."""
        if self._replace_drafter is None:
            return self.load(drafter).backend
        return self._replace_drafter(drafter)


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
        help="file of prompts, one JSON object per line, with a prompt, messages, or turns (of "
        "which only the first is used), and perhaps an id (default: "
        f"{len(PROMPTS)} built-in prompts)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=DIAGNOSIS_TOKENS,
        metavar="N",
        help=f"maximum number of new tokens per answer (default: {DIAGNOSIS_TOKENS})",
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--raw", action="store_true", help="use the prompts without the chat template")
    way.add_argument(
        "--thinking",
        action="store_true",
        help="use the prompts with thinking on (default: as in the drafter's training)",
    )
    parser.add_argument(
        "--thorough", action="store_true", help="try more tokens as the drafter's mask token"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    return parser


def _report(diagnosis: Diagnosis) -> list[str]:
    lines = []
    if diagnosis.marginal is not None:
        lines.append(f"agreement by depth: {_percentages(diagnosis.marginal)}")
    if diagnosis.corrected is not None:
        lines.append(f"with the AR head:   {_percentages(diagnosis.corrected)}")
    if diagnosis.evaluation is not None:
        lines.append(f"in its evaluation:  {_percentages(diagnosis.evaluation)}")
    return [*lines, *map(_line, diagnosis.findings)]


def _line(finding: Finding) -> str:
    verdict = "ok" if finding.ok else "problem"
    return f"{verdict:<8} {finding.check:<14} {finding.message}"


def _percentages(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.0%}" for share in shares)
