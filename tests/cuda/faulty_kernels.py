"""Faults that are planted in the text of a module or of a function."""

import importlib.util
import inspect
import sys
from pathlib import Path
from textwrap import dedent
from unittest.mock import patch

from treeflash_cuda.gpu.triton_kernels import attention


def faulty(module, tmp_path, right, wrong):
    """Return a copy of a module of kernels with another expression in it."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert right in source
    path = tmp_path / "faulty.py"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("faulty", path)
    found = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, faulty=found):  # where dataclasses look their module up
        spec.loader.exec_module(found)
    if module is attention:
        found.PROGRAMS = attention.PROGRAMS  # few of them: see `triton_interpreter`
    return found


def plant(monkeypatch, owner, name, right, wrong):
    """Put another expression into a function, for all that have imported it."""
    function, made = getattr(owner, name), {}
    source = dedent(inspect.getsource(function))
    assert right in source
    undecorated = source[source.index("def ") :].replace(right, wrong)
    text = "from __future__ import annotations\n" + undecorated
    exec(text, function.__globals__, made)
    monkeypatch.setattr(function, "__code__", made[name].__code__)
