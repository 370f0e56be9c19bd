"""The default pair under load: ten minutes, or as long as TREEFLASH_LOAD_SECONDS says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("TREEFLASH_LOAD_SECONDS", "600"))


@pytest.mark.nightly
def test_load():
    command = [sys.executable, "-m", "benchmarks.serving.load", "--seconds", str(SECONDS)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    report = json.loads(done.stdout)
    assert report["compared"] > SECONDS / 10
    assert report["different"] == 0
    assert report["requests"]["leave"] > 0
    assert report["requests"]["invalid"] > 0
    before, most = report["memory_mib"]
    assert most <= 1.1 * before
