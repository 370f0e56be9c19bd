"""Tests that need a framework skip without it, but not where all frameworks should be there."""

from __future__ import annotations

import importlib
import os

import pytest

VARIABLE = "TREEFLASH_REQUIRE_BACKENDS"


def require(module: str) -> None:
    """Skip the calling module or test where `module` cannot be imported, and say why.

    With the environment variable `TREEFLASH_REQUIRE_BACKENDS` set, as in continuous integration,
    the import error is raised instead: a skip there would hide that nothing was tested.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        if os.environ.get(VARIABLE):
            raise
        pytest.skip(f"needs {module}: {error}", allow_module_level=True)
