"""The threads of PyTorch's operations on a CPU: as many as chosen, or as others leave free."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import psutil
import torch

from treeflash.decoding.threads import ProcessorTimes, ThreadPolicy
from treeflash.processors import quota, usable_processors

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
"""Variables of the environment with which users choose the number of threads themselves."""


class Threads:
    """The number of threads of one process; see `treeflash.decoding.threads`.

    A number that the user chose, with `choose` or a variable of the environment, stays.

    Where functions of our own compute all products, they alone share work: between them threads
    fall asleep, and PyTorch's small operations take less time than waking a thread, which takes
    milliseconds in a virtual machine.

    Attributes:
        number: threads of a pass.
    """

    def __init__(self) -> None:
        self.policy: ThreadPolicy | None = None
        self.number = torch.get_num_threads()
        self._is_compiled = False  # whether all products of the latest pass are
        if not any(map(os.environ.get, VARIABLES)):
            processors = usable_processors()
            most = min(torch.get_num_threads(), quota(len(processors)))
            self.policy = ThreadPolicy(
                most, len(processors), lambda: read_times(processors), time.monotonic
            )

    def choose(self, number: int) -> None:
        """Use this number of threads from now on."""
        self.policy, self.number = None, number
        torch.set_num_threads(number)

    def update(self, is_compiled: bool) -> None:
        """Set the number of threads of the next operations of this thread of the program.

        Compiled functions alone share work if they compute all products.
        """
        if self.policy is not None:
            self.number = self.policy.update()
        elif not (is_compiled or self._is_compiled):
            return
        self._is_compiled = is_compiled
        number = 1 if is_compiled else self.number
        # OpenMP keeps the number by thread of the program: another one may have set its own.
        if torch.get_num_threads() != number:
            torch.set_num_threads(number)

    @property
    def of_compiled(self) -> int:
        """The number of threads of compiled functions."""
        return max(self.number, torch.get_num_threads())

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Give the caller's number of threads back afterwards."""
        before = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @property
    def description(self) -> str:
        """The present number, and why it is that."""
        number = self.number
        if self.policy is None:
            return f"{number}, as chosen (--threads or {VARIABLES[0]})"
        text = f"{number} of {self.policy.most}"
        return f"{text}; other programs use {self.policy.others:.1f} processors"


@cache
def cpu_threads() -> Threads:
    """Return the threads of this process."""
    return Threads()


def read_times(processors: list[int]) -> ProcessorTimes:
    """Read the clock, the time that some processors computed, and this process's part of it."""
    every = psutil.cpu_times(percpu=True)
    busy = 0.0
    for number in processors:
        if number < len(every):  # processors that are switched off are not listed
            times = every[number]
            # Guests count as `user` already.
            named = times._asdict()
            idle = sum(named.get(x, 0.0) for x in ("idle", "iowait", "guest", "guest_nice"))
            busy += sum(times) - idle
    return ProcessorTimes(time.monotonic(), busy, time.process_time())
