"""Turns of threads that compute on the same processors or device.

Two models of a server have a scheduler each, in a thread of its own. If both computed at once on a
CPU, twice as many threads as processors would wait for each other at the end of every operation,
which costs far more than half of the speed. So they take turns, an iteration each:

    model A     iteration . . . . . iteration . . . . .
    model B     . . . . . iteration . . . . . iteration

A lock of Python alone is not enough: the thread that releases it would nearly always get it again.
"""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A lock that threads get in the order in which they asked for it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self.waiting: deque[threading.Lock] = deque()  # each is released when its turn comes

    def __enter__(self) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            self.waiting.append(turn)
        turn.acquire()

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self.waiting:
                self.waiting.popleft().release()
            else:
                self._taken = False
