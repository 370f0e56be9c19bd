"""Generate text from the command line: `python -m treeflash.generate`."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from rich.console import Console

from treeflash.cli.compare import compare, warm_up
from treeflash.cli.explain import explain
from treeflash.cli.options import (
    BAD_INPUT,
    INTERRUPTED,
    Parser,
    add_decode_options,
    add_model_options,
    decode_options,
    guarded,
    load_model,
)
from treeflash.cli.prompt_batch import Batch
from treeflash.cli.summary import summarise
from treeflash.errors import ConfigError, PromptError
from treeflash.language_model import LanguageModel, Options
from treeflash.text.generation import Generation
from treeflash.text.prompt_file import read_rows, read_text
from treeflash.text.stream import Stream

SAMPLE_PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."
EXPLAINED = 3
NOT_EQUAL = 1


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, generate, and return the exit code.

    0: done; 1: `--compare` found a difference; 2: bad input, be it one prompt of many; 130:
    interrupted.
    """
    args = _parser().parse_args(argv)
    options = decode_options(args)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if args.prompts is not None or args.output is not None:
        return _run_batch(args, options, console)
    prompt = _prompt(args, console)
    model = load_model(args, [options["method"]] if "method" in options else [])
    _mention_thinking(model, options, console)
    return _run(model.stream(prompt, **options), model, args, console)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("treeflash.generate", "Generate text, losslessly faster with draft trees.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "prompt", nargs="?", help="(default: what is piped into standard input, else a sample)"
    )
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from it")
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="many prompts: objects with an id, and turns, a prompt, or messages; needs --output",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="where they go, a line per turn; what it holds already is not decoded again",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, not the text")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="decode plainly too: check that the texts are equal (else exit 1), show the speedup",
    )
    parser.add_argument(
        "--explain",
        type=_iterations,
        nargs="?",
        default=0,
        const=EXPLAINED,
        metavar="N",
        help=f"draw the trees of the first N iterations ({EXPLAINED} where N is left out)",
    )
    add_decode_options(parser)
    add_model_options(parser)
    return parser


def _iterations(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of iterations; write --explain={EXPLAINED}, "
            "or put the prompt before --explain"
        )
    return int(text)


def _prompt(args: argparse.Namespace, console: Console) -> str:
    """The prompt: the argument, or a file or standard input less a last newline, or the sample."""
    if args.prompt is not None:
        return str(args.prompt)
    if args.prompt_file is not None:
        source, text = args.prompt_file, read_text(args.prompt_file)
    elif _is_piped(sys.stdin):
        source, text = "standard input", _read(sys.stdin)
    else:
        console.print(f"no prompt given, so a sample: {SAMPLE_PROMPT}\n")
        return SAMPLE_PROMPT
    if not text.strip():
        raise PromptError(f"{source} is empty; give a prompt")
    return text.removesuffix("\n")


def _read(stream: TextIO) -> str:
    try:
        return stream.read()
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not text: {error.reason}") from error


def _is_piped(stream: TextIO | None) -> bool:
    """Whether something was put into a stream: it is neither a terminal nor the null device."""
    if stream is None or stream.closed:
        return False
    try:
        return not stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    except OSError:  # no file at all, but something in memory
        return True


def _mention_thinking(model: LanguageModel, options: Options, console: Console) -> None:
    thinking = (options.get("template_args") or {}).get("enable_thinking")
    if thinking and model.tokenizer.knows_thinking:
        console.print(
            "note: thinking is on; the published drafters were trained with it off "
            "and draft less well so"
        )


def _run(stream: Stream, model: LanguageModel, args: argparse.Namespace, console: Console) -> int:
    """Decode one prompt, show it, and return the exit code."""
    if args.compare:
        warm_up(stream)
    shown = 0
    try:
        for chunk in stream:
            if not args.json:
                print(chunk.text, end="", flush=True)
                shown += len(chunk.text)
    except KeyboardInterrupt:
        pass  # the generation says so, and holds what there is
    except Exception:
        if shown:
            print(flush=True)  # the error gets a line of its own
        raise
    generation = stream.generation()
    if not args.json:
        print(generation.text[shown:], flush=True)
    for number, step in enumerate(stream.steps[1 : args.explain + 1], 1):
        console.print(explain(step, number, model.tokenizer))
    code = INTERRUPTED if generation.finish_reason == "interrupted" else 0
    if args.compare and code == 0:
        try:
            generation = replace(generation, compare=compare(generation, stream))
        except KeyboardInterrupt:
            console.print("interrupted while decoding plainly: not compared")
            code = INTERRUPTED
    _report(generation, args.json, console)
    if generation.compare is not None and not generation.compare.equal:
        code = NOT_EQUAL
    return code


def _report(generation: Generation, as_json: bool, console: Console) -> None:
    if as_json:
        print(json.dumps(generation.to_dict()))
    console.print(summarise(generation), markup=False)


def _run_batch(args: argparse.Namespace, options: Options, console: Console) -> int:
    """Decode a file of prompts into another, and return the exit code."""
    if args.prompts is None or args.output is None:
        raise ConfigError("--prompts and --output go together; give both")
    for flag in ("compare", "explain", "json"):
        if getattr(args, flag):
            raise ConfigError(f"--{flag} is for a single prompt; leave it out with --prompts")
    rows = read_rows(args.prompts)
    if args.output.exists() and args.output.samefile(args.prompts):
        raise ConfigError("--output is the file of the prompts; give another one")
    batch = Batch.resume(rows, args.output)
    model = load_model(args, [options["method"]] if "method" in options else [])
    _mention_thinking(model, options, console)
    try:
        batch.run(model, options, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; {batch.report()}; the same command goes on from there")
        return INTERRUPTED
    console.print(batch.report())
    return BAD_INPUT if batch.errors else 0


if __name__ == "__main__":
    sys.exit(main())
