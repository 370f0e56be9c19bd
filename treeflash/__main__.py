"""The process of the command `treeflash`: nothing that takes long is imported unprotected."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from treeflash.interruption import EXIT_INTERRUPTED, never_swallowed, say_interrupted


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's, and return the exit status."""
    try:
        with never_swallowed():
            from treeflash.command import main as run_command
    except KeyboardInterrupt:
        return say_interrupted()
    return run_command(argv)


def run(*command: str) -> NoReturn:
    """Run a command line that begins with these words, and end the process."""
    status = EXIT_INTERRUPTED  # if Ctrl-C is pressed again while the first one ends the command
    with suppress(KeyboardInterrupt):
        status = main([*command, *sys.argv[1:]])
    # Python would show a traceback of Ctrl-C from now on, and of one in the call itself.
    ignored = False
    while not ignored:
        with suppress(KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            ignored = True
    sys.exit(status)


if __name__ == "__main__":
    run()
