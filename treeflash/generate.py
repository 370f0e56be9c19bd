"""Generate text from the command line: `python -m treeflash.generate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from treeflash.cli.exit_status import guarded
from treeflash.cli.options import (
    Parser,
    add_decode_options,
    add_model_options,
    add_parallel_option,
    decode_options,
    load_model,
)
from treeflash.cli.prompt_batch import run_batch
from treeflash.cli.prompt_source import read_prompt
from treeflash.cli.single_text import run_text
from treeflash.config import AUTO
from treeflash.errors import ConfigError
from treeflash.hub.models import training_of
from treeflash.language_model import LanguageModel
from treeflash.text.many_texts import AUTO_BYTES, AUTO_TEXTS
from treeflash.text.options import Options
from treeflash.text.tokenizer import Tokenizer

EXPLAINED = 3


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, generate, and return the exit status.

    0: done; 1: `--compare` found a difference that rounding does not explain; 2: invalid input,
    even if it is one prompt of many; 130: interrupted.
    """
    args = _parser().parse_args(argv)
    options = decode_options(args)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    load = partial(_load, args, options, console)
    if args.prompts is not None or args.output is not None:
        _check_batch(args)
        return run_batch(args.prompts, args.output, options, args.parallel or AUTO, load, console)
    if args.parallel is not None:
        raise ConfigError("--parallel is for --prompts; leave it out for a single prompt")
    prompt = read_prompt(args.prompt, args.prompt_file, console)
    model = load()
    return run_text(
        model.stream(prompt, **options),
        model.tokenizer,
        console,
        as_json=args.json,
        compared=args.compare,
        explained=args.explain,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser("treeflash.generate", "Generate text faster with draft trees, losslessly.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "prompt", nargs="?", help="the prompt (default: standard input if piped, else a sample)"
    )
    source.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file"
    )
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="answer many prompts: JSON objects with an id, and turns, a prompt, or messages; "
        "requires --output",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="write one line per turn of --prompts; turns already in the file are skipped",
    )
    add_parallel_option(
        parser,
        None,
        f"conversations of --prompts to answer at once; auto: up to {AUTO_TEXTS}, fewer if their "
        f"keys and values would take more than {AUTO_BYTES >> 30} GiB (default: auto)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the text"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also decode without drafting, check that the texts are equal and show the speedup; "
        "exit with status 1 if they differ by more than rounding",
    )
    parser.add_argument(
        "--explain",
        type=_iterations,
        nargs="?",
        default=0,
        const=EXPLAINED,
        metavar="N",
        help=f"draw the draft trees of the first N iterations (N defaults to {EXPLAINED})",
    )
    add_decode_options(parser)
    add_model_options(parser)
    return parser


def _iterations(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of iterations; write --explain={EXPLAINED}, "
            "or put the prompt before --explain"
        )
    return int(text)


def _check_batch(args: argparse.Namespace) -> None:
    if args.prompts is None or args.output is None:
        raise ConfigError("--prompts and --output go together; give both")
    for flag in ("compare", "explain", "json"):
        if getattr(args, flag):
            raise ConfigError(f"--{flag} is for a single prompt; leave it out with --prompts")


def _load(args: argparse.Namespace, options: Options, console: Console) -> LanguageModel:
    model = load_model(args, [options["method"]] if "method" in options else [])
    if options.get("method") != "ar":
        _note_training(args, options, model.tokenizer, console)
    return model


def _note_training(
    args: argparse.Namespace, options: Options, tokenizer: Tokenizer, console: Console
) -> None:
    """Say where the prompts are not like those that a published drafter was trained on."""
    trained = training_of(args.drafter, args.target)
    thinking = (options.get("template_args") or {}).get("enable_thinking", trained.thinking)
    if tokenizer.knows_thinking and bool(thinking) != trained.thinking:
        on, off = ("on", "off") if thinking else ("off", "on")
        console.print(
            f"note: thinking is {on}; the drafter was trained with it {off}, "
            f"and drafts less well with it {on}"
        )
    if trained.system and not options.get("system") and not options.get("raw"):
        console.print(
            "note: the drafter was trained with the system message "
            f"{trained.system!r}; it drafts better if --system gives that"
        )


if __name__ == "__main__":
    sys.exit(main())
