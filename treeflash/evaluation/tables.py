"""The findings of an evaluation as tables, for a terminal or a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from treeflash.evaluation.depth_metrics import FIGURES, SOURCES
from treeflash.evaluation.records import MEAN, Record


class Table(NamedTuple):
    """Text in cells.

    Attributes:
        title: one line.
        note: what the columns mean.
        columns: names.
        rows: a cell a column.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def tables(findings: Mapping[str, Sequence[Record]]) -> list[Table]:
    """Those that have rows."""
    found = (
        _table(
            "Block efficiency",
            "tokens per forward of the target after the prefill; low and high: 95 % of resampled "
            "prompts",
            findings["rows"],
        ),
        _table(
            "Block efficiency of TreeFlash over DDTree",
            "over the same prompts, resampled together",
            findings["ratios"],
        ),
        _table(
            "Depths, mean over sets",
            "tvd: total variation distance to the target; top: how often the text's token is among "
            "the drafter's best; cover: the target's probability of these",
            list(_by_source(findings["depths"])),
        ),
        _table(
            "Where tokens are lost",
            "iterations by what became of the next token; candidate: the token before it is none "
            "of the M previous ones; child: it is none of the K children; budget limit: the tree "
            "had no room for it; block: it is beyond the last depth",
            findings["lost"],
        ),
    )
    return [table for table in found if table.rows]


def _table(title: str, note: str, records: Sequence[Record]) -> Table:
    columns = [key.replace("_", " ") for key in records[0]] if records else []
    rows = [[_cell(value) for value in record.values()] for record in records]
    return Table(title, note, columns, rows)


def _by_source(depths: Sequence[Record]) -> Iterator[Record]:
    """A record a depth and source, where a depth's record has both side by side."""
    for record in depths:
        if record["set"] == MEAN:
            for source in SOURCES:
                figures = {figure: record[f"{figure}_{source}"] for figure in FIGURES}
                if None not in figures.values():
                    anchors = {name: record[name] for name in ("depth", "anchors")}
                    yield {**anchors, "drafter": source, **figures}


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
