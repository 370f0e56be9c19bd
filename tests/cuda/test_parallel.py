"""Tensor parallelism: two processes on a CPU give the tokens of one."""

import json
import os
import subprocess
import sys

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import decode
from treeflash.testing import require
from treeflash.testing.models import write_drafter, write_target

require("torch")

from treeflash_cuda.backend import load  # noqa: E402

PROMPT = [3, 4, 5, 6]
CONFIG = {"budget": 8, "max_tokens": 24}
SCRIPT = f"""
import json, sys
from pathlib import Path

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import decode
from treeflash_cuda.backend import load

target, drafter, written = map(Path, sys.argv[1:])
backend = load(target, drafter, LoadConfig(device="cpu", dtype="float32"))
found = []
for method in ("treeflash", "ar"):
    steps = decode(backend, {PROMPT}, DecodeConfig(method=method, **{CONFIG}))
    found.append([int(token) for step in steps for token in step.tokens])
backend.open(50, drafts=True).fork(0, 50).close()
written.write_text(json.dumps(found))
"""


def test_two_processes_give_the_tokens_of_one(tmp_path):
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    write_target(target, "qwen3", seed=1)
    write_drafter(drafter, target, seed=2)
    script, written = tmp_path / "script.py", tmp_path / "tokens.json"
    script.write_text(SCRIPT)
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    run = subprocess.run(
        [sys.executable, *launcher, *map(str, (script, target, drafter, written))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    backend = load(target, drafter, LoadConfig(device="cpu", dtype="float32"))
    expected = []
    for method in ("treeflash", "ar"):
        steps = decode(backend, PROMPT, DecodeConfig(method=method, **CONFIG))
        expected.append([int(token) for step in steps for token in step.tokens])
    assert json.loads(written.read_text()) == expected
