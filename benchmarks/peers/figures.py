"""Aggregate the records of a comparison into rows, and plot them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.system import BASELINES
from treeflash.decoding.statistics import mean

Record = dict[str, Any]
CASE = ("system", "method", "budget", "backend", "dtype")
MEAN = "mean"


def rows(records: Iterable[Record]) -> list[Record]:
    """One row for each case and set and, if there are several sets, one for their mean.

    Args:
        records: one for each prompt and case: the columns of the case, `set`, `prompt` and the
            answer. A text that ends with its first token has no speed and is left out.
    """
    groups: dict[tuple, list[Record]] = {}
    generate: dict[tuple, Record] = {}
    for record in records:
        if not record["tokens"]:
            continue
        case = tuple(record[key] for key in CASE)
        groups.setdefault((case, record["set"]), []).append(record)
        if (record["system"], record["method"]) == (BASELINES[record["backend"]], "generate"):
            generate[_prompt_key(record)] = record
    found = [_row(own, generate) for own in groups.values()]
    if len({row["set"] for row in found}) > 1:
        cases = dict.fromkeys(case for case, _ in groups)
        found += [_mean([r for r in found if tuple(r[k] for k in CASE) == case]) for case in cases]
    return found


def _prompt_key(record: Record) -> tuple:
    return record["backend"], record["set"], record["prompt"]


def _row(own: Sequence[Record], generate: dict[tuple, Record]) -> Record:
    pairs = [(r, generate[_prompt_key(r)]) for r in own if _prompt_key(r) in generate]
    tokens = sum(record["tokens"] for record in own)
    return {key: own[0][key] for key in (*CASE, "set")} | {
        "tokens_per_s": tokens / sum(record["seconds"] for record in own),
        "block_efficiency": tokens / sum(record["forwards"] for record in own),
        "ratio_to_generate": median(_speed(r) / _speed(base) for r, base in pairs)
        if pairs
        else None,
        "equal": sum(record["token_ids"] == base["token_ids"] for record, base in pairs),
        "prompts": len(own),
    }


def _speed(record: Record) -> float:
    return record["tokens"] / record["seconds"]


def _mean(own: Sequence[Record]) -> Record:
    ratios = [row["ratio_to_generate"] for row in own]
    return (
        {key: own[0][key] for key in CASE}
        | {"set": MEAN}
        | {key: mean(row[key] for row in own) for key in ("tokens_per_s", "block_efficiency")}
        | {"ratio_to_generate": None if None in ratios else mean(ratios)}
        | {key: sum(row[key] for row in own) for key in ("equal", "prompts")}
    )


def draw(found: Sequence[Record], caption: str, path: Path) -> None:
    """Plot each case's speed relative to `generate`, mean over sets."""
    from matplotlib.figure import Figure

    last = found[-1]["set"]  # the mean if there is one, else the only set
    bars = [row for row in found if row["set"] == last and row["ratio_to_generate"] is not None]
    bars.sort(key=lambda row: (row["backend"], row["ratio_to_generate"]), reverse=True)
    labels = [
        " ".join(str(row[key]) for key in CASE[:3] if row[key] is not None) + f", {row['backend']}"
        for row in bars
    ]
    colors = [f"C{list(BASELINES).index(row['backend'])}" for row in bars]
    figure = Figure(figsize=(9, 2 + 0.3 * len(bars)), dpi=110, layout="constrained")
    axis = figure.subplots()
    drawn = axis.barh(range(len(bars)), [row["ratio_to_generate"] for row in bars], color=colors)
    axis.bar_label(drawn, fmt="%.2f", padding=3)
    axis.set_yticks(range(len(bars)), labels)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(title=f"Speed relative to plain `generate`, {last}")
    axis.set_xlabel(caption, fontsize="small", wrap=True)
    figure.savefig(path)
