"""Cost and block efficiency of the AR head's settings, replayed on the same texts.

    python -m benchmarks.decoding.replay gsm8k.jsonl --budgets 16,64 --heads full:full,1024:auto

The target writes a text by plain decoding, and at every position the drafter drafts a block, from
which each setting of the head makes a table. Replaying a setting then starts at the first position,
accepts what its tree there matches of the text, continues at the position reached, and so on to the
end. All settings see the same texts and blocks, so differences are due to the settings alone; when
decoding in half precision, the texts would diverge.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from benchmarks.common import Parser, at_least_one, mean_row, numbers, show, write_json
from benchmarks.decoding.forced_text import force
from treeflash.cli.exit_status import guarded
from treeflash.cli.options import add_model_options, full_or_number, head_rows, load_model
from treeflash.config import AUTO, DecodeConfig, HeadRows, Method
from treeflash.decoding.acceptance import accept
from treeflash.decoding.calibration import Calibration
from treeflash.decoding.interfaces import Backend, Block
from treeflash.decoding.proposals import TreeSize, propose
from treeflash.decoding.statistics import mean
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, build_tree
from treeflash.errors import ConfigError
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import encode
from treeflash.text.prompt_file import read_rows

HEADS = "full:full,2048:full,1024:full,512:full,256:full,1024:128,1024:64,1024:32,1024:auto"


class Head(NamedTuple):
    """Shortlist size of the AR head, and the number of previous tokens that it scores it for."""

    vocab: int | None
    rows: HeadRows

    @property
    def name(self) -> dict[str, Any]:
        """Its columns in the results."""
        return {"head_vocab": self.vocab or "full", "head_rows": self.rows or "full"}


class Replay(NamedTuple):
    """One setting on one text.

    Attributes:
        lengths: accepted lengths of the iterations.
        seconds: the head's time at each position of the text.
    """

    lengths: list[int]
    seconds: list[float]


Replays = dict[tuple[Head, int], list[Replay]]


def heads(text: str) -> list[Head]:
    """Comma-separated VOCAB:ROWS pairs, for argparse."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return [Head(full_or_number(vocab), head_rows(rows)) for vocab, rows in pairs]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not VOCAB:ROWS,...") from None


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("prompts", nargs="+", type=Path, metavar="FILE.jsonl", help="prompt sets")
    options.add_argument(
        "--limit", type=at_least_one, default=8, help="prompts per set (default: 8)"
    )
    options.add_argument(
        "--max-tokens", type=at_least_one, default=64, help="new tokens per prompt (default: 64)"
    )
    options.add_argument(
        "--budgets", type=numbers, default=[8, 16, 32, 64], help="(default: 8,16,32,64)"
    )
    options.add_argument(
        "--heads",
        type=heads,
        default=heads(HEADS),
        metavar="VOCAB:ROWS,...",
        help=f"shortlist size and number of previous tokens, each (default: {HEADS})",
    )
    options.add_argument(
        "--method",
        choices=("treeflash", "ddtree"),
        default="treeflash",
        help="ddtree does not run the head (default: treeflash)",
    )
    options.add_argument(
        "--uncalibrated",
        action="store_true",
        help="rank nodes by the drafter's own probabilities",
    )
    add_model_options(options)
    return options


def draft(
    backend: Backend, block: Block, method: Method, head: Head, budgets: list[int]
) -> dict[int, tuple[TransitionTable, float]]:
    """The table of each budget and the seconds taken to make it."""
    config = DecodeConfig(method=method, head_vocab=head.vocab, head_rows=head.rows)
    found = {}
    for budget in budgets if head.rows == AUTO else [max(budgets)]:
        before = time.perf_counter()
        (table,) = propose(backend, [block], [config], [TreeSize.fixed(budget)])
        seconds = time.perf_counter() - before
        found |= dict.fromkeys([budget] if head.rows == AUTO else budgets, (table, seconds))
    return found


def reached(tree: DraftTree, following: list[int]) -> int:
    """The accepted length of a tree if the text continues with `following` after its root."""
    no_token = np.full(len(tree), -1, np.int32)  # beyond the text nothing is accepted
    chosen = force(tree, following, no_token)
    return min(len(accept(tree, chosen).path), len(following))


def walk(
    tables: Sequence[TransitionTable],
    tokens: list[int],
    budget: int,
    calibration: Calibration | None,
) -> list[int]:
    """The accepted lengths of trees along a text.

    Args:
        tables: after each of its tokens but the last.
        tokens: of the text.
        budget: nodes of a tree.
        calibration: of the tables, None to take them as they are.
    """
    lengths, position = [], 0
    while position < len(tables):
        table, following = tables[position], tokens[position + 1 :]
        ranked = table if calibration is None else calibration.correct(table)
        length = reached(build_tree(ranked, tokens[position], budget), following)
        if calibration is not None:
            calibration.observe(table, following[:length])
        lengths.append(length)
        position += length
    return lengths


def replay(model: LanguageModel, prompt: Any, args: Any) -> dict[tuple[Head, int], Replay]:
    """Write one text and replay every head and budget on it; empty for a text of one token."""
    backend = model.backend
    ids = encode(model.tokenizer, prompt)
    text = TextSession(backend, drafts=True, capacity=len(ids) + args.max_tokens)
    root = text.extend(ids)
    tokens, drafts = [root], []
    while len(tokens) < args.max_tokens and root not in model.tokenizer.stop_token_ids:
        block = text.draft(root)
        drafts.append(
            [draft(backend, block, args.method, head, args.budgets) for head in args.heads]
        )
        root = int(text.verify(DraftTree.root_only(root))[0])
        text.commit(np.zeros(1, np.int32))
        tokens.append(root)
    text.close()
    found: dict[tuple[Head, int], Replay] = {}
    for i, head in enumerate(args.heads if drafts else []):
        for budget in args.budgets:
            tables, seconds = zip(*(drafted[i][budget] for drafted in drafts), strict=True)
            calibration = None if args.uncalibrated else Calibration(backend.vocab_size)
            lengths = walk(tables, tokens, budget, calibration)
            found[head, budget] = Replay(lengths, list(seconds))
    return found


def row(name: str, head: Head, budget: int, replays: list[Replay]) -> dict[str, Any]:
    """One line of the results."""
    return {"set": name, **head.name, "budget": budget} | {
        "table_ms": 1000 * median(s for replay in replays for s in replay.seconds),
        "block_efficiency": mean(n for replay in replays for n in replay.lengths),
        "prompts": len(replays),
    }


def measure(model: LanguageModel, args: Any) -> list[dict[str, Any]]:
    """The rows of all sets and of their mean."""
    rows = []
    for path in args.prompts:
        replays: Replays = defaultdict(list)
        for prompt in track(read_rows(path)[: args.limit], path.stem):
            for case, found in replay(model, prompt.turns[0], args).items():
                replays[case].append(found)
        rows += [row(path.stem, *case, found) for case, found in replays.items()]
    cases = [{**head.name, "budget": n} for head in args.heads for n in args.budgets]
    return rows + [mean_row(rows, case, ("table_ms", "block_efficiency")) for case in cases]


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    model = load_model(args)
    if args.method == "treeflash" and model.backend.head is None:
        raise ConfigError("the drafter has no AR head; name a TreeFlash drafter with --drafter")
    rows = measure(model, args)
    backend = model.backend
    where = {"backend": backend.name, "device": backend.device, "dtype": backend.dtype}
    show(f"replay, {' '.join(where.values())}", [r for r in rows if r["set"] == "mean"])
    write_json(args.json, "replay", where | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
