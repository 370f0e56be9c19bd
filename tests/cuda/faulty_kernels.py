"""Copies of modules of kernels with a fault planted in their text."""

import importlib.util
import sys
from pathlib import Path
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
