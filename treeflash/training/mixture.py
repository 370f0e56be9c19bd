"""A mixture of several files of prompts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from treeflash.errors import PromptError
from treeflash.text.prompt_file import Row


def mix(
    files: Sequence[Sequence[Row]], weights: Sequence[float], limit: int | None, seed: int
) -> list[Row]:
    """Rows of several files, shuffled; equal arguments give equal results.

    Args:
        files: the rows of each file.
        weights: each file's share of the rows; once a file is used up, the others share its part.
        limit: number of rows; None takes every row, whatever the weights.
        seed: of the shuffle.

    Raises:
        PromptError: an id occurs in two files.
    """
    random_ = random.Random(seed)
    left = [random_.sample(list(rows), len(rows)) for rows in files]
    total = sum(map(len, left))
    wanted = total if limit is None else min(limit, total)
    mixed: list[Row] = []
    while len(mixed) < wanted:
        shares = [w if rows else 0.0 for w, rows in zip(weights, left, strict=True)]
        if not any(shares):
            break
        mixed.append(random_.choices(left, shares)[0].pop())
    counts = Counter(row.id for row in mixed)
    if repeated := next((name for name, count in counts.items() if count > 1), None):
        raise PromptError(f"the id {repeated!r} is in two files of prompts; make ids unique")
    return mixed
