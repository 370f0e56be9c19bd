"""Generate text from the command line: `treeflash generate`."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from treeflash.cli import options as cli
from treeflash.cli.console import Parser, guarded
from treeflash.cli.prompt_batch import run_batch
from treeflash.cli.single_prompt import (
    IMAGE_PROMPT,
    SAMPLE_PROMPT,
    read_prompt,
    run_answers,
    run_text,
)
from treeflash.config import AUTO, GIB
from treeflash.decoding.suffix import SuffixCache
from treeflash.errors import ConfigError
from treeflash.hub.published import drafter_training
from treeflash.language_model import LanguageModel
from treeflash.text.images import read_images
from treeflash.text.options import Options
from treeflash.text.prompt import Prompt, with_images
from treeflash.text.stream import AUTO_BYTES, AUTO_SEQUENCES

EXPLAINED_ITERATIONS = 3


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, generate, and return the exit status.

    0: done; 1: `--compare` found a difference that rounding does not explain; 2: invalid input,
    which may be one prompt of many; 130: interrupted.
    """
    args = make_parser().parse(argv)
    options = cli.decode_options(args)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    load = partial(_load, args, options, console)
    if args.prompts is not None or args.output is not None:
        if args.prompts is None or args.output is None:
            raise ConfigError("--prompts and --output must be given together")
        if extra := next(
            (f for f in ("compare", "explain", "image", "json", "n") if getattr(args, f)), None
        ):
            raise ConfigError(f"--{extra} is for a single prompt; remove it, or --prompts")
        cache_bytes = int((args.suffix_cache_gb or 0) * GIB)
        suffix_cache = SuffixCache(cache_bytes) if cache_bytes else None
        return run_batch(args, options, load, console, suffix_cache)
    for name in ("suffix_cache_gb", *(["parallel"] if args.n is None else [])):
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} needs --prompts; remove it for a single prompt")
    if args.n is not None and args.n < 1:
        raise ConfigError(f"n must be 1 or more, got {args.n}")
    if args.n is not None and (args.compare or args.explain):
        raise ConfigError("--compare and --explain are for a single answer; remove --n")
    if args.image and options.get("raw"):
        raise ConfigError("images need the chat template; remove --raw")
    sample = IMAGE_PROMPT if args.image else SAMPLE_PROMPT
    text = read_prompt(args.prompt, args.prompt_file, console, sample)
    prompt: Prompt = text
    if args.image:
        images = read_images(args.image)  # a file that is not an image is refused before loading
        prompt = [{"role": "user", "content": with_images(text, images)}]
    if options.get("temperature") and "seed" not in options:
        options["seed"] = secrets.randbits(32)
    model = load()
    if args.n is not None:
        return run_answers(
            model, prompt, options, args.n, console, parallel=args.parallel, as_json=args.json
        )
    return run_text(
        model.stream(prompt, **options),
        model.names,
        console,
        as_json=args.json,
        compared=args.compare,
        explained=args.explain,
    )


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


def _load(args: argparse.Namespace, options: Options, console: Console) -> LanguageModel:
    """Load the models; prints a note if the drafter was trained on other prompts."""
    model = cli.load_model(args, [options.get("method")])
    if options.get("method") in ("ar", "suffix") or model.backend.drafter_config is None:
        return model
    # The best known drafter of the target may have been skipped.
    automatic = args.drafter in (None, AUTO)
    drafter = model.names["drafter"] if automatic else args.drafter
    trained = drafter_training(drafter, args.target)
    thinking = (options.get("template_args") or {}).get("enable_thinking", trained.thinking)
    if model.tokenizer.knows_thinking and bool(thinking) != trained.thinking:
        on, off = ("on", "off") if thinking else ("off", "on")
        console.print(
            f"note: thinking is {on}, but the drafter was trained with thinking {off}; "
            "it will draft less well"
        )
    if trained.system and not options.get("system") and not options.get("raw"):
        console.print(
            "note: the drafter was trained with the system message "
            f"{trained.system!r}; it drafts better with this message as --system"
        )
    return model
