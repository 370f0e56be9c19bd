"""Where drafting first diverges from plain decoding in half precision, and by what margin.

    python -m benchmarks.decoding.half_precision gsm8k.jsonl --dtype bfloat16 [--json FILE]

In float32 both give the same tokens, and tests hold that. In bfloat16 and float16 the logits of a
node depend slightly on how many others are computed with it, so two tokens of nearly equal
probability can swap. For each prompt this reports the first token that differs, the gap between the
top two logits of plain decoding there, and the spacing of floating-point numbers of that size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from rich.progress import track

from benchmarks.common import Parser, Row, describe, show, write_json
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import encode, read_rows

FRACTION_BITS = {"float32": 23, "bfloat16": 7, "float16": 10}


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=8, max_tokens=64)
    options.add_number("--budget", 16, "nodes of a draft tree")
    add_model_options(options)
    return options


def compare(model: LanguageModel, prompt_ids: list[int], max_tokens: int, budget: int) -> Row:
    """The first difference between drafting and plain decoding of one prompt, and the margin."""
    plain = model.generate(prompt_ids, method="ar", max_tokens=max_tokens).token_ids
    drafted = model.generate(prompt_ids, budget=budget, max_tokens=max_tokens).token_ids
    pairs = enumerate(zip(plain, drafted, strict=False))
    first = next((i for i, (expected, token) in pairs if expected != token), None)
    row = {"tokens": len(plain), "first_difference": first, "margin": None, "spacing": None}
    if first is not None:
        best, second = top_two_logits(model, prompt_ids + plain[:first])
        spacing = 2.0 ** (np.floor(np.log2(abs(best))) - FRACTION_BITS[model.backend.dtype])
        row |= {"margin": best - second, "spacing": float(spacing)}
    return row


def top_two_logits(model: LanguageModel, tokens: list[int]) -> tuple[float, float]:
    """The two largest logits after these tokens."""
    with SequenceSession(model.backend, capacity=len(tokens)) as session:
        if len(tokens) > 1:
            session.extend(tokens[:-1])
        logits = np.sort(session.logits(DraftTree.root_only(tokens[-1]))[0])
    return float(logits[-1]), float(logits[-2])


def summary(rows: Sequence[Row]) -> str:
    """One line for all prompts."""
    margins = [row["margin"] for row in rows if row["margin"] is not None]
    if not margins:
        return f"all {len(rows)} sequences are equal to plain decoding"
    return (
        f"{len(margins)} of {len(rows)} sequences diverge from plain decoding; the margin at the "
        f"first difference has the median {np.median(margins):.3g} and the maximum "
        f"{max(margins):.3g}"
    )


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    model = load_model(args)
    rows = []
    for path in args.prompts:
        for prompt in track(read_rows(path)[: args.limit], path.stem):
            ids = encode(model.tokenizer, prompt.turns[0])
            difference = compare(model, ids, args.max_tokens, args.budget)
            rows.append({"set": path.stem, "id": prompt.id, **difference})
    pair = describe(model.backend)
    show(f"half precision, {', '.join(pair.values())}", rows)
    print(summary(rows))
    write_json(args.json, "half_precision", pair | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
