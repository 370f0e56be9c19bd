"""How commands end: one-line errors and exit statuses."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from treeflash.errors import TreeflashError, is_out_of_memory

BAD_INPUT = 2
INTERRUPTED = 130  # as shells report a program that SIGINT ended
READER_GONE = 141  # and one that SIGPIPE ended


class Main(Protocol):
    """The main function of a command."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run with these arguments, or those of the process, and return the exit status."""


def guarded(main: Main) -> Main:
    """Make the main function of a command end with an exit status, whatever the user did.

    Invalid input prints a one-line error and exits with status 2, an interruption with 130. Any
    other exception is a fault of the program and is not caught.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        _open_closed_streams()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # not every terminal has every character
        try:
            code = main(argv)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # Python flushes standard output once more at exit; that must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return READER_GONE
        except (TreeflashError, OSError) as error:
            return _fail(str(error))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return _fail(
                "out of memory; try shorter texts, smaller draft trees (--budget) or batches, "
                "--dtype bfloat16, or a smaller model"
            )
        return code

    return run


def _open_closed_streams() -> None:
    """Let what a shell closed (`>&-`), which Python shows as None, swallow what is printed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT
