"""The table of the ablation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.ablation.cells import CELLS
from benchmarks.ablation.measure import Record, figures
from benchmarks.page import table
from treeflash.evaluation.bootstrap import interval, resamples


def ablation_table(records: Sequence[Record]) -> str:
    """In Markdown: a line for each cell that was measured, in the order of `CELLS`.

    A figure is the mean over seeds of the block efficiency, with its 95 % bootstrap interval over
    prompts; the seeds share the resampled prompts.
    """
    rows = []
    for cell in CELLS:
        own = [record for record in records if record["cell"] == cell.name]
        if own:
            values = {name: _figure([record[name] for record in own]) for name in figures()}
            rows.append({"choice": cell.choice, "value": cell.value, "seeds": len(own)} | values)
    return table(rows)


def _figure(seeds: Sequence[Sequence[tuple[int, int]]]) -> str:
    """Of (tokens, forward passes) by seed and prompt; seeds may lack different prompts."""
    random = np.random.default_rng(0)
    count = min(map(len, seeds))
    drawn = resamples(count, random)
    values = []
    for prompts in seeds:
        tokens, forwards = np.array(prompts[:count]).T
        values.append(tokens[drawn].sum(1) / forwards[drawn].sum(1))
    mean = np.mean(values, 0)
    low, high = interval(mean)
    return f"{mean[0]:.2f} ({low:.2f} to {high:.2f})"
