"""The decoding core in NumPy: draft trees, acceptance, sampling, the decode loop, the scheduler."""

from treeflash.decoding.decode_text import decode
from treeflash.decoding.loop import Step
from treeflash.decoding.requests import Request, check
from treeflash.decoding.running_text import Ticket
from treeflash.decoding.scheduler import Scheduler, SchedulerConfig

__all__ = ["Request", "Scheduler", "SchedulerConfig", "Step", "Ticket", "check", "decode"]
