"""A command imports neither the compiler nor distributed tensors; both can be imported later."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from treeflash.testing import require
from treeflash.testing.models import write_pair

require("torch")

CODE = """
import sys
from treeflash_cuda.command_imports import COMPILER, prepare

prepare()
heavy = {COMPILER, "torch._dynamo.convert_frame", "torch.distributed.tensor"} & set(sys.modules)
assert not heavy, heavy

from pathlib import Path
import torch
from treeflash.config import LoadConfig
from treeflash_cuda.backend import load

target, drafter = map(Path, sys.argv[1:])
backend = load(target, drafter, LoadConfig(device="cpu"))
assert torch.distributed.is_available()
double = torch.compile(lambda x: 2 * x, backend="eager")
assert double(torch.ones(3)).tolist() == [2.0] * 3
assert "torch._dynamo.convert_frame" in sys.modules
"""


def run(code: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_runs_and_the_compiler_can_be_imported_afterwards(tmp_path):
    run(CODE, *write_pair(tmp_path, "llama"))


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "LOCAL_RANK"])
def test_a_process_beside_others_imports_transformers_as_it_is(variable):
    code = """
import sys
from treeflash_cuda.command_imports import prepare

prepare()
assert "transformers" not in sys.modules
"""
    run(code, **{variable: "1"})
