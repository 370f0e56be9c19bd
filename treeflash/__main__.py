"""The process of the command `treeflash`: nothing that takes long is imported unprotected."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
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
    try:
        status = main([*command, *sys.argv[1:]])
    except KeyboardInterrupt:  # Ctrl-C again, while the first one was ending the command
        status = EXIT_INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python would show a traceback from now on
    sys.exit(status)


if __name__ == "__main__":
    run()
