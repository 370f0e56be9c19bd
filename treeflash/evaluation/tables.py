"""The records of an evaluation as tables, for a terminal or a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from treeflash.evaluation.depth_metrics import METRICS, SOURCES
from treeflash.evaluation.records import MEAN, Record


class Table(NamedTuple):
    """A table of text cells.

    Attributes:
        title: one line.
        note: explains the columns.
        columns: their names.
        rows: one cell per column.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def tables(records: Mapping[str, Sequence[Record]]) -> list[Table]:
    """All tables that have rows."""
    found = (
        _table(
            "Block efficiency",
            "tokens per target forward pass after the prefill; low and high: 95 % bootstrap "
            "interval over prompts",
            records["rows"],
        ),
        _table(
            "Block efficiency of TreeFlash over DDTree",
            "over the same prompts, resampled together",
            records["ratios"],
        ),
        _table(
            "Depth metrics, mean over sets",
            "tvd: total variation distance to the target; top: how often the text's token is among "
            "the drafter's top tokens; cover: the target's probability of these",
            list(_by_source(records["depths"])),
        ),
        _table(
            "Rejections",
            "iterations by the reason why the next token was not drafted; candidate: the token "
            "before it is not among the M previous tokens; child: it is not among the K children; "
            "budget limit: the tree had no room for it; block: it lies beyond the last depth",
            records["lost"],
        ),
    )
    return [table for table in found if table.rows]


def _table(title: str, note: str, records: Sequence[Record]) -> Table:
    columns = [key.replace("_", " ") for key in records[0]] if records else []
    rows = [[_cell(value) for value in record.values()] for record in records]
    return Table(title, note, columns, rows)


def _by_source(depth_metrics: Sequence[Record]) -> Iterator[Record]:
    """One record per depth and source, from records that hold both sources of a depth."""
    for record in depth_metrics:
        if record["set"] == MEAN:
            for source in SOURCES:
                metrics = {metric: record[f"{metric}_{source}"] for metric in METRICS}
                if None not in metrics.values():
                    anchors = {name: record[name] for name in ("depth", "anchors")}
                    yield {**anchors, "drafter": source, **metrics}


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
