"""The processors that this process may use."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
"""The limits of a container."""
QUOTA_FILES = ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
"""Files that have the microseconds of processor time that a container may take in a period, and the
period's, in the second version of control groups and in the first."""

CPUINFO = Path("/proc/cpuinfo")
"""What Linux knows of each processor, with an empty line between two."""
IDENTIFYING = ("vendor", "cpu family", "model", "stepping", "flags", "CPU", "Features")
"""The beginnings of its lines that neither time nor load changes."""


def usable_processors() -> list[int]:
    """Return the processors that this process may run on, by number."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def quota(processors: int, folder: Path = CONTROL_GROUPS) -> int:
    """Return the whole processors that a container's limit leaves of some; all without a limit."""
    for names in QUOTA_FILES:
        try:
            texts = [(folder / name).read_text(encoding="ascii") for name in names]
            allowed, period = map(int, " ".join(texts).split())
        except (OSError, ValueError):  # the other version, or no limit
            continue
        if allowed > 0:  # the first version writes -1 for no limit
            return max(min(processors, math.ceil(allowed / period)), 1)
    return processors


def most_threads() -> int:
    """Return the number of threads that can compute at once."""
    return quota(len(usable_processors()))


def processor_facts() -> list[str]:
    """Tell which processor this is and which instructions it has, as far as the system says."""
    facts = [platform.machine(), platform.processor()]
    try:
        with CPUINFO.open(encoding="utf-8", errors="replace") as file:
            first = file.read().partition("\n\n")[0].splitlines()
    except OSError:  # only Linux has this file
        return facts
    return facts + [line for line in first if line.startswith(IDENTIFYING)]
