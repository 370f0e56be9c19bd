"""The results of an evaluation for readers: tables, plots and an HTML page."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from treeflash.config import METHODS, check_writable
from treeflash.errors import ConfigError
from treeflash.evaluation.records import MEAN, Record
from treeflash.evaluation.run import BEST, METRICS, SOURCES


def check_files(json_file: Path | None, report: Path | None, prompts: Iterable[Path]) -> None:
    """Raise a ConfigError if a file cannot be written, or would replace another one of the run."""
    inputs = {path.resolve() for path in prompts}
    for path in (json_file, report):
        if path is None:
            continue
        check_writable(path)
        if path.resolve() in inputs:
            raise ConfigError(f"{path} is a file of prompts; choose another file")
    if report is not None:
        check_report(report)
        if json_file is not None and json_file.resolve() == report.resolve():
            raise ConfigError(f"--output and --report are both {report}; choose another file")


def check_report(path: Path) -> None:
    """Raise a ConfigError if this report could not be written."""
    if path.suffix not in (".html", ".png"):
        raise ConfigError(f"--report writes FILE.html or FILE.png, not {path}")
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "--report needs matplotlib; pip install '.[report]' in a clone of treeflash"
        )


def publish(
    records: Mapping[str, Sequence[Record]],
    settings: Mapping[str, Any],
    title: str,
    json_file: Path | None,
    report: Path | None,
) -> None:
    """Print the tables and write the files, which show the settings too.

    One failure does not prevent the other outputs. A ConfigError names a file that failed.
    """
    with ExitStack() as outputs:
        if report is not None:
            shown = {key: value for key, value in settings.items() if value is not None}
            subtitle = ", ".join(f"{key.replace('_', ' ')} {shown[key]}" for key in shown)
            outputs.callback(
                _write, report, lambda path: write_report(path, records, title, subtitle)
            )
        if json_file is not None:
            outputs.callback(_write_json, json_file, {**settings, **records})
        # rich would exit with status 1 if the reader of standard output is gone.
        print(_render(tables(records)), end="", flush=True)


def _write_json(path: Path, results: Mapping[str, Any]) -> None:
    text = json.dumps(results, indent=2) + "\n"
    _write(path, lambda path: path.write_text(text, "utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


class Table(NamedTuple):
    """A table of text cells: a title, an explanation of the columns, their names, and the rows."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def tables(records: Mapping[str, Sequence[Record]]) -> list[Table]:
    """Return all tables that have rows."""
    records = defaultdict(tuple, records)
    candidates = (
        _table(
            "Block efficiency",
            "tokens per target forward pass after the prefill; low and high: 95 % bootstrap "
            "interval over prompts",
            records["rows"],
        ),
        _table(
            "Ratios of block efficiencies",
            "of the method to the baseline, on the same prompts and with the same budget (a chain "
            "uses one node for each depth of the block); low and high: 95 % bootstrap interval "
            "over prompts",
            records["ratios"],
        ),
        _table(
            "Depth metrics, mean over sets",
            "tvd: total variation distance to the target; top: how often the text's token is among "
            "the drafter's top tokens; cover: the target's probability of the drafter's top tokens",
            list(_by_source(records["depths"])),
        ),
        _table(
            "Rejections",
            "iterations by the reason why the bonus token was not drafted; candidate: the token "
            "before it is not among the M previous tokens; child: it is not among the K children; "
            "budget limit: the tree had no room for it; block: it comes after the last depth",
            records["lost"],
        ),
        _table(
            "Best drafts",
            "how often the most probable draft of a depth is the target's token; spine: each token "
            "before it was the best draft; sibling: one was not",
            records["branches"],
        ),
    )
    return [table for table in candidates if table.rows]


def _table(title: str, note: str, records: Sequence[Record]) -> Table:
    columns = [key.replace("_", " ") for key in records[0]] if records else []
    rows = [[_cell(value) for value in record.values()] for record in records]
    return Table(title, note, columns, rows)


def _by_source(depth_metrics: Sequence[Record]) -> Iterator[Record]:
    """Yield one record per depth and source, from the records of the mean with both sources."""
    for record in depth_metrics:
        if record["set"] == MEAN:
            for source in SOURCES:
                metrics = {metric: record[f"{metric}_{source}"] for metric in METRICS}
                if None not in metrics.values():
                    anchors = {name: record[name] for name in ("depth", "anchors")}
                    yield {**anchors, "drafter": source, **metrics}


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def _render(tables: Sequence[Table]) -> str:
    text = io.StringIO()
    console = Console(file=text, markup=False, highlight=False)
    for table in tables:
        drawing = RichTable(
            title=table.title, caption=table.note, box=box.SIMPLE, padding=(0, 1, 0, 0)
        )
        drawing.title_justify = drawing.caption_justify = "left"
        for name, *cells in zip(table.columns, *table.rows, strict=True):
            drawing.add_column(name, min_width=max(map(len, cells)))
        for row in table.rows:
            drawing.add_row(*row)
        console.print(drawing, crop=False)  # a narrow terminal must not lose figures
    return text.getvalue()


LINES = {"marginal": "--", "corrected": "-"}


def draw(records: Mapping[str, Sequence[Record]], title: str = "") -> bytes:
    """Draw plots of the records into a PNG image; all but the last show means over sets."""
    from matplotlib.figure import Figure

    records = defaultdict(tuple, records)
    depth_metrics = [record for record in records["depths"] if record["set"] == MEAN]
    rows = [row for row in records["rows"] if row["set"] == MEAN and row["method"] != "ar"]
    # Each method has its own color in all reports; names of joined records have the next ones.
    methods = dict.fromkeys((*METHODS, *(row["method"] for row in records["rows"])))
    colors = {method: f"C{n}" for n, method in enumerate(methods)}
    lines = 2 if depth_metrics else 1
    figure = Figure(figsize=(15, 4.5 * lines), dpi=110, layout="constrained")
    if title:
        figure.suptitle(title, wrap=True)
    axes = figure.subplots(lines, 2)
    *upper, efficiencies, lengths = axes.flat
    if upper:
        _distances(upper[0], depth_metrics)
        _coverage(upper[1], depth_metrics)
    _efficiencies(efficiencies, rows, colors)
    _lengths(lengths, records["accepted"], colors)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        if axis.get_legend_handles_labels()[0]:
            # The legend is beside the plot, where it hides no line.
            axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
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


def _efficiencies(axis: Any, rows: Sequence[Record], colors: Mapping[str, str]) -> None:
    axis.set(
        title="Block efficiency, with 95 % intervals",
        xlabel="budget, nodes",
        ylabel="tokens per target forward pass",
    )
    budgets = sorted({row["budget"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(budgets, budgets)
    axis.minorticks_off()
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [row for row in rows if row["method"] == method]
        middle = np.array([row["block_efficiency"] for row in points])
        errors = np.abs([[row[end] for row in points] - middle for end in ("low", "high")])
        sizes = [row["budget"] for row in points]
        axis.errorbar(sizes, middle, errors, marker="o", capsize=3, label=method, c=colors[method])


def _lengths(axis: Any, accepted: Sequence[Record], colors: Mapping[str, str]) -> None:
    """Plot histograms over all sets, for each method at its largest budget."""
    from matplotlib.ticker import MaxNLocator

    axis.set(
        title="Accepted lengths, all sets, largest budget",
        xlabel="tokens per iteration",
        ylabel="fraction of iterations",
    )
    methods = list(dict.fromkeys(record["method"] for record in accepted))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    width = 0.8 / max(1, len(methods))
    for n, method in enumerate(methods):
        budget = max(record["budget"] for record in accepted if record["method"] == method)
        sets = [r["iterations"] for r in accepted if (r["method"], r["budget"]) == (method, budget)]
        counts = np.zeros(max(map(len, sets)))
        for iterations in sets:
            counts[: len(iterations)] += iterations
        places = np.arange(1, len(counts) + 1) + width * (n - (len(methods) - 1) / 2)
        label = f"{method}, {budget}"
        axis.bar(places, counts / counts.sum(), width, label=label, color=colors[method])


PAGE_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em }
img { max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: 0.2em 0.8em; text-align: left }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ subtitle }}</p>
<img alt="plots of the tables below" src="data:image/png;base64,{{ image }}">
{% for table in tables %}
<h2>{{ table.title }}</h2>
<p>{{ table.note }}</p>
<table>
<tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
</body>
</html>
"""


def write_report(
    path: Path, records: Mapping[str, Sequence[Record]], title: str, subtitle: str = ""
) -> None:
    """Write the plots as PNG, or plots and tables as a self-contained HTML page, by the suffix."""
    if path.suffix == ".png":
        path.write_bytes(draw(records, f"{title}\n{subtitle}"))
        return
    page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE_TEMPLATE)
    encoded = base64.b64encode(draw(records)).decode()
    text = page.render(title=title, subtitle=subtitle, image=encoded, tables=tables(records))
    path.write_text(text, encoding="utf-8")
