"""Where drafting first departs from plain decoding in half precision, and how near a tie that was.

In float32 both are equal, and tests hold that. In bfloat16 and float16 a node's logits depend a
little on how many others are computed with it, so that two tokens of nearly equal probability can
change places. This reports, per prompt, the first new token that differs and the margin between
plain decoding's best two logits there, beside the spacing of numbers of that size.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import Parser, at_least_one, show, write_json
from rich.progress import track

from treeflash.cli.options import add_model_options, guarded, load_model
from treeflash.config import SamplingConfig
from treeflash.decoding.tree import DraftTree
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import encode
from treeflash.text.prompt_file import read_rows

BITS = {"float32": 23, "bfloat16": 7, "float16": 10}  # of the fraction


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("prompts", nargs="+", type=Path, metavar="FILE.jsonl", help="one a set")
    options.add_argument("--limit", type=at_least_one, default=8, help="prompts a set (8)")
    options.add_argument("--max-tokens", type=at_least_one, default=64, help="a prompt (64)")
    options.add_argument("--budget", type=at_least_one, default=16, help="of the trees (16)")
    add_model_options(options)
    return options


def compare(model: LanguageModel, prompt_ids: list[int], max_tokens: int, budget: int) -> dict:
    """One prompt: the first difference, and the margin there."""
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
    """The best two logits after some tokens."""
    verifier = model.backend.verifier(features=False)
    verifier.prefill(tokens[:-1], SamplingConfig(), None)
    logits = np.sort(verifier.logits(DraftTree.root_only(tokens[-1]))[0])
    return float(logits[-1]), float(logits[-2])


def summary(rows: list[dict[str, Any]]) -> str:
    """The report in one line."""
    margins = [row["margin"] for row in rows if row["margin"] is not None]
    if not margins:
        return f"{len(rows)} texts, none differs from plain decoding"
    return (
        f"{len(rows)} texts, {len(margins)} differ from plain decoding; where they first do, the "
        f"margin is {np.median(margins):.3g} in the median and {max(margins):.3g} at most"
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
