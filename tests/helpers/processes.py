"""Commands of the core in separate processes, for tests of signals, pipes and exit statuses.

Where PyTorch is installed, transformers imports it, which takes most of the time of a short
process. The core needs no framework, so these processes find none.
"""

from __future__ import annotations

import sys
from pathlib import Path

FRAMEWORKS = {"torch", "mlx", "mlx_lm"}
WITHOUT_FRAMEWORKS = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *path: None if name.split(".")[0] in {FRAMEWORKS} else find(name, *path)
)
"""
"""A program's first lines, after which the frameworks are as if they were not installed."""


def hide_frameworks(folder: Path) -> None:
    """Write a module that Python imports at its start where the folder is on `PYTHONPATH`."""
    (folder / "sitecustomize.py").write_text(WITHOUT_FRAMEWORKS)


RUN = """
import sys
from treeflash.__main__ import main

sys.exit(main())
"""


def core_command(*arguments: str) -> list[str]:
    """Return a command line that runs `treeflash` with these arguments."""
    return [sys.executable, "-c", WITHOUT_FRAMEWORKS + RUN, *arguments]


RUN_MODULE = """
import sys
from runpy import run_module

run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def core_module(name: str, *arguments: str) -> list[str]:
    """Return a command line that does what `python -m` does, and fails at its warning."""
    warnings = "-W", "error::RuntimeWarning"
    return [sys.executable, *warnings, "-c", WITHOUT_FRAMEWORKS + RUN_MODULE, name, *arguments]
