"""The decoding core in NumPy: draft trees, acceptance, sampling, and the only decode loop."""

from treeflash.decoding.loop import Step, check, decode

__all__ = ["Step", "check", "decode"]
