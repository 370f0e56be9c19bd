"""Commands on a console: one-line errors, exit statuses, progress bars."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from treeflash.errors import TreeflashError, is_device_lost, is_out_of_memory

DEVICE_LOST = 1
BAD_INPUT = 2
INTERRUPTED = 130  # the exit status that shells report for SIGINT
READER_GONE = 141  # the exit status that shells report for SIGPIPE
DEVICE_LOST_ADVICE = (
    "the GPU refuses further work of this process; start again, with smaller draft trees "
    "(--budget) or without other programs on the GPU"
)


class Main(Protocol):
    """The main function of a command."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run with arguments, by default the process's, and return the exit status."""


def guarded(main: Main) -> Main:
    """Make the main function of a command end with an exit status, whatever the user does.

    Invalid input prints a one-line error and exits with status 2, a GPU that refuses further work
    with 1; an interruption exits with 130.
    Other exceptions are faults of the program and are not caught.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        _open_closed_streams()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
        try:
            code = main(argv)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # Python flushes standard output again at exit, which must not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return READER_GONE
        except TreeflashError as error:
            return _fail(str(error))
        except OSError as error:
            named = error.filename is not None
            return _fail(f"{error.filename}: {error.strerror}" if named else str(error))
        except (MemoryError, RuntimeError) as error:
            if is_device_lost(error):
                return _fail(f"{DEVICE_LOST_ADVICE} ({error})", DEVICE_LOST)
            if not is_out_of_memory(error):
                raise
            return _fail(
                "out of memory; try shorter texts, smaller draft trees (--budget) or batches, "
                "--dtype bfloat16, or a smaller model"
            )
        return code

    return run


def _open_closed_streams() -> None:
    """Discard the output of streams that a shell closed (`>&-`); in Python they are None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


def _fail(message: str, status: int = BAD_INPUT) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def progress(console: Console, *further: ProgressColumn) -> Progress:
    """A bar with a description, a count and the remaining time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, *further, TimeRemainingColumn(), console=console)
