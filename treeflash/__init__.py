"""Lossless speculative decoding of language models with TreeFlash draft trees."""

from __future__ import annotations

import sys

if sys.argv[:1] == ["-m"] and any(arg.startswith("treeflash.") for arg in sys.orig_argv):
    # `python -m treeflash.<command>` is starting, and its imports take seconds: an interruption
    # meanwhile needs no traceback.
    sys.excepthook = lambda kind, error, traceback: (
        print("interrupted", file=sys.stderr)
        if kind is KeyboardInterrupt
        else sys.__excepthook__(kind, error, traceback)
    )

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.errors import TreeflashError
from treeflash.language_model import LanguageModel, load
from treeflash.text.assembler import Chunk
from treeflash.text.generation import Generation, TokenLogProb
from treeflash.text.stream import Stream

__all__ = [
    "Chunk",
    "DecodeConfig",
    "Generation",
    "LanguageModel",
    "SamplingConfig",
    "Stream",
    "TokenLogProb",
    "TreeflashError",
    "__version__",
    "load",
]

__version__: str


def __getattr__(name: str) -> str:
    # Looked up when asked for, so that a source tree that is not installed can be imported.
    if name == "__version__":
        from importlib.metadata import version

        return version("treeflash")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
