"""How many threads a pass on a CPU takes while other programs use the machine too.

Problem. A pass runs hundreds of short parallel regions, and each ends when its slowest thread does.
With one thread for each processor, one other busy program takes a processor away from a thread for
milliseconds again and again, while the others spin at the barrier: on two processors a busy program
made plain decoding four times slower, and two made it up to twenty times slower.

Idea. A processor that is in use anyway is of no use to a barrier. The operating system knows how
much of the machine other programs use, so a pass takes one thread for each processor that is left.
This costs no pass that tries another number, and a program's own threads, which spin, do not count.

Example. Two processors; within 0.25 s they were busy for 0.5 s in all, and this process computed
for 0.25 s of it. So other programs use 1.0 processors and 1.0 are left: one thread. The other
program ends: the two processors are now busy for 0.25 s, all of it by this process, so 2.0 are left
and passes take two threads again.

Rule. Take fewer threads once others use more than `TOLERATED` of a processor that a thread would
need, and more once they use less than `RELEASED`; the gap keeps the number from flapping. A user's
own choice is never changed. In exact mode the number of threads changes no bit of a result; in
float32 it changes rounding, as the size of a tree does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

INTERVAL_S = 0.25
"""Seconds between two readings; processor times have a resolution of about 0.01 s."""
TOLERATED, RELEASED = 0.5, 0.25
"""The share of a processor in use by others above which a thread is given up, and below which it is
taken back."""


class ProcessorTimes(NamedTuple):
    """Seconds since some fixed moment."""

    elapsed: float  # wall-clock seconds
    busy: float  # seconds that processors computed, summed over processors
    own: float  # seconds that they computed for this process


@dataclass
class ThreadPolicy:
    """Chooses the number of threads of a pass.

    Args:
        most: the number of threads on an idle machine, 1 or more.
        processors: the processors that `read` counts; at least 1.
        read: the processor times until now, and the clock.
        clock: seconds since some fixed moment, as in `ProcessorTimes.elapsed`.
    """

    most: int
    processors: int
    read: Callable[[], ProcessorTimes]
    clock: Callable[[], float]
    threads: int = field(init=False)  # threads of the next pass
    others: float = field(default=0.0, init=False)  # processors that other programs used lately
    _last: ProcessorTimes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.threads = self.most
        self._last = self.read()

    def update(self) -> int:
        """Return the number of threads for the next pass, from 1 to `most`."""
        last = self._last  # other threads of the program may replace it
        if self.most == 1 or self.clock() - last.elapsed < INTERVAL_S:
            return self.threads
        now = self._last = self.read()
        used = (now.busy - last.busy) - (now.own - last.own)
        self.others = min(max(used / (now.elapsed - last.elapsed), 0.0), float(self.processors))
        free = self.processors - self.others
        fewer, more = math.floor(free + TOLERATED), math.floor(free + RELEASED)
        chosen = max(min(self.threads, fewer), more)
        self.threads = min(max(chosen, 1), self.most)
        return self.threads
