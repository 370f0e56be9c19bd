"""The progress bar of commands that work through many things."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def progress(console: Console, *further: ProgressColumn) -> Progress:
    """A bar that says what is done, how much of it, and how long the rest takes."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, *further, TimeRemainingColumn(), console=console)
