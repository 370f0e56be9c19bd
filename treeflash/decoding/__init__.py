"""The decoding core in NumPy: draft trees, acceptance, sampling, the decode loop, the scheduler."""

from treeflash.decoding.loop import Step
from treeflash.decoding.scheduler import (
    Request,
    RequestId,
    Scheduler,
    SchedulerConfig,
    check,
    decode,
    decode_request,
)

__all__ = [
    "Request",
    "RequestId",
    "Scheduler",
    "SchedulerConfig",
    "Step",
    "check",
    "decode",
    "decode_request",
]
