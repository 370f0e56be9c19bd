"""The records of an evaluation as plots. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from treeflash.config import METHODS
from treeflash.evaluation.depth_metrics import BEST, SOURCES
from treeflash.evaluation.records import MEAN, Record

COLORS: dict[str, str] = {method: f"C{n}" for n, method in enumerate(METHODS)}
LINES = {"marginal": "--", "corrected": "-"}


def draw(records: Mapping[str, Sequence[Record]], title: str) -> bytes:
    """Draw four plots into one PNG image; all but the last show means over sets.

    Args:
        records: from `treeflash.evaluation.records.compute_records`.
        title: shown above the plots.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    figure.suptitle(title, wrap=True)
    axes = figure.subplots(2, 2)
    depth_metrics = [record for record in records["depths"] if record["set"] == MEAN]
    rows = [row for row in records["rows"] if row["set"] == MEAN and row["method"] != "ar"]
    _distances(axes[0, 0], depth_metrics)
    _coverage(axes[0, 1], depth_metrics)
    _efficiencies(axes[1, 0], rows)
    _lengths(axes[1, 1], records["accepted"])
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _distances(axis: Any, depth_metrics: Sequence[Record]) -> None:
    axis.set(title="Distance to the target", xlabel="depth", ylabel="total variation distance")
    for color, source in enumerate(SOURCES):
        _line(
            axis, depth_metrics, f"tvd_{source}", source, color=f"C{color}", linestyle=LINES[source]
        )


def _coverage(axis: Any, depth_metrics: Sequence[Record]) -> None:
    axis.set(
        title="Coverage by the drafter's top tokens",
        xlabel="depth",
        ylabel="target probability covered",
    )
    for color, k in enumerate(BEST):
        for source in SOURCES:
            style = {"color": f"C{color}", "linestyle": LINES[source]}
            _line(axis, depth_metrics, f"cover{k}_{source}", f"top {k}, {source}", **style)


def _line(axis: Any, depth_metrics: Sequence[Record], key: str, label: str, **style: Any) -> None:
    points = [(record["depth"], record[key]) for record in depth_metrics if record[key] is not None]
    if points:
        axis.plot(*zip(*points, strict=True), marker=".", label=label, **style)


def _efficiencies(axis: Any, rows: Sequence[Record]) -> None:
    axis.set(
        title="Block efficiency, with 95 % intervals",
        xlabel="budget, nodes",
        ylabel="tokens per target forward pass",
    )
    budgets = sorted({row["budget"] for row in rows})
    if budgets:
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, budgets)
        axis.minorticks_off()
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        middle = np.array([row["block_efficiency"] for row in own])
        errors = np.abs([[row[end] for row in own] - middle for end in ("low", "high")])
        sizes = [row["budget"] for row in own]
        axis.errorbar(sizes, middle, errors, marker="o", capsize=3, label=method, c=COLORS[method])


def _lengths(axis: Any, accepted: Sequence[Record]) -> None:
    """Histograms over all sets, for each method at its largest budget."""
    axis.set(
        title="Accepted lengths, all sets, largest budget",
        xlabel="tokens per iteration",
        ylabel="fraction of iterations",
    )
    methods = list(dict.fromkeys(record["method"] for record in accepted))
    width = 0.8 / max(1, len(methods))
    for n, method in enumerate(methods):
        budget = max(record["budget"] for record in accepted if record["method"] == method)
        own = [r["iterations"] for r in accepted if (r["method"], r["budget"]) == (method, budget)]
        counts = np.zeros(max(map(len, own)))
        for iterations in own:
            counts[: len(iterations)] += iterations
        places = np.arange(1, len(counts) + 1) + width * (n - (len(methods) - 1) / 2)
        label = f"{method}, {budget}"
        axis.bar(places, counts / counts.sum(), width, label=label, color=COLORS[method])
