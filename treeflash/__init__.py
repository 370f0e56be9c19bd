"""Lossless speculative decoding of language models with TreeFlash draft trees."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treeflash.config import DecodeConfig, SamplingConfig
    from treeflash.decoding import Request, Scheduler
    from treeflash.errors import TreeflashError
    from treeflash.language_model import LanguageModel, load
    from treeflash.text.async_stream import AsyncStream
    from treeflash.text.generation import Generation, TokenLogProb
    from treeflash.text.stream import Chunk, Stream

__all__ = [
    "AsyncStream",
    "Chunk",
    "DecodeConfig",
    "Generation",
    "LanguageModel",
    "Request",
    "SamplingConfig",
    "Scheduler",
    "Stream",
    "TokenLogProb",
    "TreeflashError",
    "__version__",
    "load",
]

__version__: str

_MODULES = {
    "config": ("DecodeConfig", "SamplingConfig"),
    "decoding": ("Request", "Scheduler"),
    "errors": ("TreeflashError",),
    "language_model": ("LanguageModel", "load"),
    "text.async_stream": ("AsyncStream",),
    "text.generation": ("Generation", "TokenLogProb"),
    "text.stream": ("Chunk", "Stream"),
}


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that `treeflash --help` takes no second, and a source tree
    # that is not installed, which has no version, can be imported.
    if name == "__version__":
        from importlib.metadata import version

        return version("treeflash")
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(f"treeflash.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
