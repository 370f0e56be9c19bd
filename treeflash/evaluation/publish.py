"""Publish the records of an evaluation: tables on standard output, JSON and a report in files."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from treeflash.errors import ConfigError
from treeflash.evaluation.records import Record
from treeflash.evaluation.report import check_report, write_report
from treeflash.evaluation.tables import Table, tables


def check_files(json_file: Path | None, report: Path | None, prompts: Iterable[Path]) -> None:
    """Check before an evaluation that its files can be written.

    Raises:
        ConfigError: a file cannot be written, or is one of the prompt files.
    """
    inputs = {path.resolve() for path in prompts}
    for path in (json_file, report):
        if path is None:
            continue
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"{path} cannot be written")
        if path.resolve() in inputs:
            raise ConfigError(f"{path} is a file of prompts; choose another file")
    if report is not None:
        check_report(report)


def publish(
    records: Mapping[str, Sequence[Record]],
    settings: Mapping[str, Any],
    json_file: Path | None,
    report: Path | None,
) -> None:
    """Print the tables and write the files. A failure of one does not prevent the others.

    Args:
        records: from `treeflash.evaluation.records.compute_records`.
        settings: of the evaluation; the JSON file and the report show them.
        json_file: the file for the records, if any.
        report: the file for the report, if any.

    Raises:
        ConfigError: a file cannot be written; the message names it.
    """
    with ExitStack() as outputs:
        if report is not None:
            given = {key.replace("_", " "): value for key, value in settings.items()}
            title = ", ".join(f"{key} {value}" for key, value in given.items() if value is not None)
            outputs.callback(_written, report, lambda path: write_report(path, records, title))
        if json_file is not None:
            text = json.dumps({**settings, **records}, indent=2) + "\n"
            outputs.callback(_written, json_file, lambda path: path.write_text(text, "utf-8"))
        # Not to standard output directly: if its reader is gone, rich exits with status 1.
        print(_rendered(tables(records)), end="", flush=True)


def _written(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _rendered(found: Sequence[Table]) -> str:
    text = io.StringIO()
    console = Console(file=text, highlight=False)
    for table in found:
        shown = RichTable(
            title=table.title, caption=table.note, box=box.SIMPLE, padding=(0, 1, 0, 0)
        )
        shown.title_justify = shown.caption_justify = "left"
        for name, *cells in zip(table.columns, *table.rows, strict=True):
            shown.add_column(name, min_width=max(map(len, cells)))
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    return text.getvalue()
