"""The decoding core in NumPy: draft trees, acceptance, sampling, the decode loop, the scheduler."""

from treeflash.decoding.loop import Step
from treeflash.decoding.scheduler import (
    Request,
    RequestId,
    Scheduler,
    SchedulerConfig,
    best_method,
    check,
    decode,
)

__all__ = [
    "Request",
    "RequestId",
    "Scheduler",
    "SchedulerConfig",
    "Step",
    "best_method",
    "check",
    "decode",
]
