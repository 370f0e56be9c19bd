"""The decoding core in NumPy: draft trees, acceptance, sampling, the decode loop, the scheduler."""

from treeflash.decoding.loop import Step
from treeflash.decoding.request import Request, best_method, check
from treeflash.decoding.scheduler import PromptProgress, Scheduler, SchedulerConfig, decode

__all__ = [
    "PromptProgress",
    "Request",
    "Scheduler",
    "SchedulerConfig",
    "Step",
    "best_method",
    "check",
    "decode",
]
