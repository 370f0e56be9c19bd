"""What `treeflash generate` does with its options: texts of one prompt, or of a file of prompts."""

from __future__ import annotations

import argparse
import secrets
from functools import partial

from rich.console import Console

from treeflash.cli import options as cli
from treeflash.cli.console import plain_console
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
from treeflash.text.tokenizer import check_unicode


def run(args: argparse.Namespace) -> int:
    """Generate as the command line says; returns the exit status of `treeflash generate`."""
    options = cli.decode_options(args)
    console = plain_console()
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
    check_unicode(text, "the prompt")
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
