"""Where drafting first diverges from plain decoding in half precision, and by what margin.

    python -m benchmarks.decoding.half_precision gsm8k.jsonl --dtype bfloat16 [--json FILE]

In float32 both give the same tokens, and tests hold that. In bfloat16 and float16 a node's logits
depend slightly on how many others are computed with it, so two tokens of nearly equal probability
can swap. This reports, per prompt, the first token that differs, the gap between the top two
logits of plain decoding there, and the spacing of floating-point numbers of that size.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks.common import Parser, at_least_one, show, write_json
from treeflash.cli.exit_status import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import encode
from treeflash.text.prompt_file import read_rows

BITS = {"float32": 23, "bfloat16": 7, "float16": 10}  # of the fraction


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
        "--budget", type=at_least_one, default=16, help="nodes of a tree (default: 16)"
    )
    add_model_options(options)
    return options


def compare(model: LanguageModel, prompt_ids: list[int], max_tokens: int, budget: int) -> dict:
    """One prompt: the first difference and the margin there."""
    plain = model.generate(prompt_ids, method="ar", max_tokens=max_tokens).token_ids
    drafted = model.generate(prompt_ids, budget=budget, max_tokens=max_tokens).token_ids
    pairs = enumerate(zip(plain, drafted, strict=False))
    first = next((i for i, (mine, other) in pairs if mine != other), None)
    if first is None:
        return {"tokens": len(plain), "first_difference": None, "margin": None, "spacing": None}
    best, second = top_two(model, prompt_ids + plain[:first])
    spacing = 2.0 ** (np.floor(np.log2(abs(best))) - BITS[model.backend.dtype])
    return {
        "tokens": len(plain),
        "first_difference": first,
        "margin": best - second,
        "spacing": float(spacing),
    }


def top_two(model: LanguageModel, tokens: list[int]) -> tuple[float, float]:
    """The top two logits after some tokens."""
    with TextSession(model.backend, capacity=len(tokens)) as text:
        if len(tokens) > 1:
            text.extend(tokens[:-1])
        logits = np.sort(text.logits(DraftTree.root_only(tokens[-1]))[0])
    return float(logits[-1]), float(logits[-2])


def summary(rows: list[dict[str, Any]]) -> str:
    """One line for all prompts."""
    margins = [row["margin"] for row in rows if row["margin"] is not None]
    if not margins:
        return f"{len(rows)} texts, all equal to plain decoding"
    return (
        f"{len(rows)} texts, {len(margins)} diverge from plain decoding; at the first difference "
        f"the median margin is {np.median(margins):.3g}, the largest {max(margins):.3g}"
    )


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    model = load_model(args)
    rows = []
    for path in args.prompts:
        for prompt in track(read_rows(path)[: args.limit], path.stem):
            ids = encode(model.tokenizer, prompt.turns[0])
            found = compare(model, ids, args.max_tokens, args.budget)
            rows.append({"set": path.stem, "id": prompt.id, **found})
    where = {"backend": model.backend.name, "dtype": model.backend.dtype}
    show(f"half precision, {' '.join(where.values())}", rows)
    print(summary(rows))
    write_json(args.json, "half_precision", where | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
