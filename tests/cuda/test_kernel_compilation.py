"""The Triton kernels are compiled for GPUs that are not there, and fit them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from treeflash.testing import require

require("torch")
require("triton")

ROOT = Path(__file__).parents[2]
KERNELS = {
    "shared_positions",
    "own_positions",
    "rms_norm",
    "gated",
    "rotate_and_store",
    "linear",
    "add_parts",
    "grouped_linear",
    "sample",
    "write_log_probs",
    "sum_parts",
    "draft_noise",
    "tree_recurrence",
    "commit_recurrence",
    "convolve_paths",
    "move_columns",
}
PAIRS = [
    (120, "gemma-2-9b"),  # the least shared memory, and the widest heads
    *((capability, "qwen3-8b") for capability in (75, 80, 86, 89, 90, 100, 120)),
    (75, "llama-3.2-1b"),
    (90, "llama-3.2-1b"),
    (120, "llama-3.2-1b"),
    *((capability, "qwen3-8b in float32") for capability in (80, 90)),
]


# The compiler takes a minute for each; Triton's interpreter runs the same kernels every time.
@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for CUDA is for Linux")
@pytest.mark.parametrize(("capability", "model"), PAIRS)
def test_kernels_fit_the_gpu_and_spill_nothing(module, capability, model, tmp_path):
    shared_memory = module("kernels").SHARED_MEMORY
    assert set(shared_memory) == {x for x, _ in PAIRS}
    file = tmp_path / "out.json"
    command = ["-m", "benchmarks.kernels", "--json", str(file), "--capability", str(capability)]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, "--model", model],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    usages = json.loads(file.read_text())["rows"]
    assert {usage["kernel"] for usage in usages} == KERNELS
    for usage in usages:
        assert usage["registers"] > 0, usage
        assert usage["spilled_bytes"] == 0, usage
        assert usage["shared_bytes"] <= shared_memory[capability], usage
