"""Ctrl-C while a command starts: it ends the command wherever Python runs at that moment.

Python drops an exception that a `__del__` or a callback raises, and some extensions drop every
exception that a lookup raises, so a KeyboardInterrupt may get lost in the middle of an import.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED = 130  # the exit status that shells report for SIGINT
REPEATED_AFTER_S = 0.02
"""Seconds until a dropped interruption is repeated: the code that dropped it has ended by then. If
not, it is dropped and repeated again."""


def say_interrupted() -> int:
    """Print that the user ended the command, and return its exit status."""
    print("interrupted", file=sys.stderr, flush=True)
    return EXIT_INTERRUPTED


@contextmanager
def repeated_if_dropped() -> Iterator[None]:
    """Raise a KeyboardInterrupt again if Python reports that it cannot be raised."""
    before = sys.unraisablehook

    def repeat(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        while True:
            try:
                _thread.start_new_thread(_interrupt_soon, ())
                return
            except KeyboardInterrupt:  # another Ctrl-C must not be dropped either
                pass

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt_soon() -> None:
    time.sleep(REPEATED_AFTER_S)
    _thread.interrupt_main()


@contextmanager
def never_swallowed() -> Iterator[None]:
    """End the block with a KeyboardInterrupt if Ctrl-C was pressed in it, whatever became of it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # no Ctrl-C arrives here
        return
    raised = before
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raised(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if pressed:  # the error says what an interrupted import lacks, for example
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
