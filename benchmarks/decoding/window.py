"""Block efficiency after long prompts, with a window of the drafter's context and without.

    python -m benchmarks.decoding.window gsm8k.jsonl humaneval.jsonl --contexts 4096,7936

A prompt is as many prompts of a set as the context holds, one after another. The target writes a
text by plain decoding, and at every position the drafter drafts once with each window. Replaying a
window then starts at the first position and continues at the position that its tree reaches: all
windows see the same texts.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks.common import Parser, at_least_one, numbers, show, write_json
from benchmarks.decoding.replay import walk
from treeflash.cli.exit_status import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import DecodeConfig
from treeflash.decoding.calibration import Calibration
from treeflash.decoding.proposals import TreeSize, propose
from treeflash.decoding.statistics import mean
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import encode
from treeflash.text.prompt_file import read_rows

WINDOWS = "all,2048,1024,512,256,64"


def windows(text: str) -> list[int | None]:
    """Comma-separated numbers of positions, or `all`, for argparse."""
    try:
        return [None if part == "all" else int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not N,... or all") from None


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("prompts", nargs="+", type=Path, metavar="FILE.jsonl", help="prompt sets")
    options.add_argument(
        "--limit", type=at_least_one, default=2, help="texts per set and context (default: 2)"
    )
    options.add_argument(
        "--max-tokens", type=at_least_one, default=64, help="new tokens per text (default: 64)"
    )
    options.add_argument(
        "--contexts",
        type=numbers,
        default=[4096, 7936],
        help="tokens of a prompt at most (default: 4096,7936)",
    )
    options.add_argument(
        "--windows", type=windows, default=windows(WINDOWS), help=f"(default: {WINDOWS})"
    )
    options.add_argument("--budget", type=at_least_one, default=16, help="nodes (default: 16)")
    add_model_options(options)
    return options


def long_prompts(model: LanguageModel, path: Path, context: int, limit: int) -> list[list[int]]:
    """Token ids of prompts that fill a context, each with others of the set."""
    turns, found = [row.turns[0][-1]["content"] for row in read_rows(path)], []
    while turns and len(found) < limit:
        count = len(turns)
        while len(ids := encode(model.tokenizer, "\n\n".join(turns[:count]))) > context:
            count = max(1, min(count - 1, count * context // len(ids)))
        found.append(ids)
        turns = turns[count:]
    return found


def replay(model: LanguageModel, ids: list[int], args: Any) -> dict[int | None, list[int]]:
    """Write one text; the accepted lengths of every window."""
    backend: Any = model.backend
    config = DecodeConfig(method=model.best_method)
    text = TextSession(backend, drafts=True, capacity=len(ids) + args.max_tokens)
    root = text.extend(ids)
    tokens: list[int] = [root]
    tables: dict[int | None, list[TransitionTable]] = defaultdict(list)
    while len(tokens) < args.max_tokens and root not in model.tokenizer.stop_token_ids:
        for window in args.windows:
            backend.drafter.window = window
            block = text.draft(root)
            (table,) = propose(backend, [block], [config], [TreeSize.fixed(args.budget)])
            tables[window].append(table)
        root = int(text.verify(DraftTree.root_only(root))[0])
        text.commit(np.zeros(1, np.int32))
        tokens.append(root)
    text.close()
    return {
        window: walk(own, tokens, args.budget, Calibration(backend.vocab_size))
        for window, own in tables.items()
    }


def measure(model: LanguageModel, args: Any) -> list[dict[str, Any]]:
    """A row for each context and window, over all sets."""
    rows = []
    for context in args.contexts:
        lengths: dict[int | None, list[int]] = defaultdict(list)
        texts = [
            ids for path in args.prompts for ids in long_prompts(model, path, context, args.limit)
        ]
        for ids in track(texts, f"{context} tokens"):
            for window, found in replay(model, ids, args).items():
                lengths[window] += found
        rows += [
            {
                "context": context,
                "window": window or "all",
                "block_efficiency": mean(found),
                "iterations": len(found),
                "texts": len(texts),
            }
            for window, found in lengths.items()
        ]
    return rows


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    model = load_model(args)
    rows = measure(model, args)
    backend = model.backend
    where = {"backend": backend.name, "device": backend.device, "dtype": backend.dtype}
    show(f"windows of the drafter's context, {' '.join(where.values())}", rows)
    write_json(args.json, "window", where | {"budget": args.budget, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
