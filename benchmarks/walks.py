"""What the AR head's settings cost and bring, along the same texts.

    python benchmarks/walks.py gsm8k.jsonl --budgets 16,64 --heads full:full,1024:auto

The target writes a text plainly, and at every position of it the drafter drafts a block, from which
each setting of the head makes a tree. Its block efficiency is that of a walk along the text: from a
position to the one that its tree reaches there, and so on. All settings see the same texts and the
same blocks, so that what differs is theirs alone; when decoding in half precision, it is not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from common import Parser, at_least_one, mean_row, numbers, show, write_json
from one_text import follow
from rich.progress import track

from treeflash.cli.options import add_model_options, full_or_number, guarded, head_rows, load_model
from treeflash.config import AUTO, DecodeConfig, HeadRows, SamplingConfig
from treeflash.decoding.acceptance import accept
from treeflash.decoding.interfaces import Backend, Block, Drafter
from treeflash.decoding.loop import propose
from treeflash.decoding.statistics import mean
from treeflash.decoding.tree import DraftTree, build_tree
from treeflash.errors import ConfigError
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import encode
from treeflash.text.prompt_file import read_rows

GREEDY = SamplingConfig()
HEADS = "full:full,2048:full,1024:full,512:full,256:full,1024:128,1024:64,1024:32,1024:auto"


class Head(NamedTuple):
    """How many tokens the head scores after how many previous ones."""

    vocab: int | None
    rows: HeadRows

    @property
    def name(self) -> dict[str, Any]:
        """As the results give it."""
        return {"head_vocab": self.vocab or "full", "head_rows": self.rows or "full"}


class Walk(NamedTuple):
    """A head along a text: what each tree brought that was visited, and what all tables took."""

    lengths: list[int]
    seconds: list[float]


Walks = dict[tuple[Head, int], list[Walk]]


def heads(text: str) -> list[Head]:
    """Heads separated by commas, each VOCAB:ROWS."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return [Head(full_or_number(vocab), head_rows(rows)) for vocab, rows in pairs]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not VOCAB:ROWS,...") from None


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("prompts", nargs="+", type=Path, metavar="FILE.jsonl", help="one a set")
    options.add_argument("--limit", type=at_least_one, default=8, help="prompts a set (8)")
    options.add_argument("--max-tokens", type=at_least_one, default=64, help="a prompt (64)")
    options.add_argument("--budgets", type=numbers, default=[8, 16, 32, 64], help="(8,16,32,64)")
    options.add_argument(
        "--heads",
        type=heads,
        default=heads(HEADS),
        metavar="VOCAB:ROWS,...",
        help=f"tokens that are scored, and the previous tokens after which they are ({HEADS})",
    )
    add_model_options(options)
    return options


def draft(
    backend: Backend, drafter: Drafter, block: Block, root: int, head: Head, budgets: list[int]
) -> dict[int, tuple[DraftTree, float]]:
    """The tree of each budget, and the seconds that its table took."""
    config = DecodeConfig(method="treeflash", head_vocab=head.vocab, head_rows=head.rows)
    found = {}
    # The first nodes of a tree are the tree of that budget, unless the table depends on it.
    for budget in budgets if head.rows == AUTO else [max(budgets)]:
        before = time.perf_counter()
        table = propose(backend, drafter, block, config, budget)
        seconds = time.perf_counter() - before
        tree = build_tree(table, root, budget)
        sizes = [budget] if head.rows == AUTO else budgets
        found |= {size: (tree.first(size), seconds) for size in sizes}
    return found


def reached(tree: DraftTree, following: list[int]) -> int:
    """Tokens that a tree brings where these follow its root."""
    nothing = np.full(len(tree), -1, np.int32)  # beyond the text no token is drafted
    chosen = follow(tree, following, nothing)
    return min(len(accept(tree, chosen).path), len(following))


def walk(model: LanguageModel, prompt: Any, args: Any) -> dict[tuple[Head, int], Walk]:
    """Write one text, and walk along it with every head and budget; of one token there is none."""
    backend = model.backend
    verifier, drafter = backend.verifier(features=True), backend.drafter()
    root, features = verifier.prefill(encode(model.tokenizer, prompt), GREEDY, None)
    tokens, drafts = [root], []
    while len(tokens) < args.max_tokens and root not in model.tokenizer.stop_token_ids:
        block = drafter.draft(features, root)
        drafts.append(
            [draft(backend, drafter, block, root, head, args.budgets) for head in args.heads]
        )
        root = int(verifier.verify(DraftTree.root_only(root), GREEDY, None)[0])
        features = verifier.commit(np.zeros(1, np.int32))
        tokens.append(root)
    found: dict[tuple[Head, int], Walk] = {}
    for i, head in enumerate(args.heads if drafts else []):
        for budget in args.budgets:
            trees, seconds = zip(*(position[i][budget] for position in drafts), strict=True)
            lengths, place = [], 0
            while place < len(trees):
                lengths.append(reached(trees[place], tokens[place + 1 :]))
                place += lengths[-1]
            found[head, budget] = Walk(lengths, list(seconds))
    return found


def row(name: str, head: Head, budget: int, walks: list[Walk]) -> dict[str, Any]:
    """One line of the results."""
    return {"set": name, **head.name, "budget": budget} | {
        "table_ms": 1000 * median(s for walk in walks for s in walk.seconds),
        "block_efficiency": mean(n for walk in walks for n in walk.lengths),
        "prompts": len(walks),
    }


def measure(model: LanguageModel, args: Any) -> list[dict[str, Any]]:
    """The rows of all sets, and of their mean."""
    rows = []
    for path in args.prompts:
        walks: Walks = defaultdict(list)
        for prompt in track(read_rows(path)[: args.limit], path.stem):
            for case, found in walk(model, prompt.turns[0], args).items():
                walks[case].append(found)
        rows += [row(path.stem, *case, found) for case, found in walks.items()]
    cases = [{**head.name, "budget": n} for head in args.heads for n in args.budgets]
    return rows + [mean_row(rows, case, ("table_ms", "block_efficiency")) for case in cases]


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    model = load_model(args)
    if model.backend.head is None:
        raise ConfigError("the drafter has no AR head; name a TreeFlash drafter with --drafter")
    rows = measure(model, args)
    backend = model.backend
    where = {"backend": backend.name, "device": backend.device, "dtype": backend.dtype}
    show(f"walks, {' '.join(where.values())}", [r for r in rows if r["set"] == "mean"])
    write_json(args.json, "walks", where | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
