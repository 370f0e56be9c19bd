"""Generate text from the command line: `treeflash generate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from treeflash.cli import options as cli
from treeflash.cli.console import Parser, guarded
from treeflash.config import AUTO_BYTES, AUTO_SEQUENCES
from treeflash.interruption import never_swallowed

EXPLAINED_ITERATIONS = 3


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, generate, and return the exit status.

    0: done; 1: `--compare` found a difference that rounding does not explain; 2: invalid input,
    which may be one prompt of many; 130: interrupted.
    """
    args = make_parser().parse(argv)
    with never_swallowed():
        from treeflash.cli.generation import run  # its imports take longer than `--help`
    return run(args)


def make_parser() -> Parser:
    parser = Parser("generate", "Generate text with lossless speculative decoding.")
    parser.add_config_option()
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "prompt",
        nargs="?",
        help="the prompt, or - for standard input (default: standard input if it is piped, else "
        "a sample prompt)",
    )
    source.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file"
    )
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="answer the prompts of a file, one JSON object per line, with a prompt (and images), "
        "messages, or turns, and perhaps an id; requires --output",
    )
    parser.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        help="put an image before the prompt: PNG, JPEG, WebP or GIF; may be repeated",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="write one line per turn of --prompts; turns already in the file are skipped",
    )
    parser.add_argument(
        "--n", type=int, metavar="N", help="write N answers, each with its own seed"
    )
    cli.add_parallel_option(
        parser,
        None,
        "conversations of --prompts, or answers of --n, to decode at once; auto: up to "
        f"{AUTO_SEQUENCES}, fewer if they would need more than {AUTO_BYTES >> 30} GiB of KV cache "
        "(default: auto)",
    )
    parser.add_argument(
        "--suffix-cache-gb",
        type=_gibibytes,
        metavar="GiB",
        help="GiB of memory for finished answers, from which later answers to --prompts may draft "
        "copies (default: 0, an answer copies only from itself)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the text"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also decode without drafting, check that the texts are equal, and show the speedup; "
        "exit with status 1 if they differ by more than rounding",
    )
    parser.add_argument(
        "--explain",
        type=_iterations,
        nargs="?",
        default=0,
        const=EXPLAINED_ITERATIONS,
        metavar="N",
        help="draw the draft trees of the first N iterations "
        f"(N defaults to {EXPLAINED_ITERATIONS})",
    )
    cli.add_decode_options(parser, note={"seed": "random, or 0 with --prompts"})
    cli.add_model_options(parser)
    return parser


def _iterations(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of iterations; write --explain={EXPLAINED_ITERATIONS}, "
            "or put the prompt before --explain"
        )
    return int(text)


def _gibibytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB, 0 or more")
    return value
