"""A command imports what its target needs: of transformers no models, where layers are our own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from byte_tokens import SPECIAL, save_tokenizer

from treeflash.testing import require, write_drafter, write_target

require("torch")

MODELS = {
    *("accelerate", "sympy", "torch._dynamo", "torch.distributed.tensor", "torchvision"),
    *("transformers.masking_utils", "transformers.modeling_utils"),
}
"""What transformers imports with its first model, which takes most of the time of a short run."""
RUN = """
import json, sys
from treeflash.__main__ import main

for command in json.loads(sys.argv[1]):
    sys.argv = ["treeflash", *command]
    try:
        assert main() == 0
    except SystemExit as end:  # of `--help`
        assert not end.code
print("imported:", *sys.modules)
"""


def modules_of(*commands: Sequence[str]) -> set[str]:
    """Run commands in a process of their own, and return the modules that it has imported."""
    told = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("imported:")[2].split())


def generate(family: str, folder: Path, *dtypes: str) -> set[str]:
    """Return the modules that `generate` imports for a tiny pair, in these dtypes."""
    target, drafter = folder / "target", folder / "drafter"
    write_target(target, family, seed=3, vocab_size=len(SPECIAL) + 256)
    write_drafter(drafter, target, seed=4)
    save_tokenizer(target)
    given = "generate", "Hi", "--target", str(target), "--drafter", str(drafter)
    given += "--max-tokens", "4", "--budget", "4"  # a number, for which no costs are measured
    given += "--device", "cpu", "--backend", "cuda", "--dtype"
    return modules_of(*((*given, dtype) for dtype in dtypes))


def test_layers_of_our_own_import_no_model_of_transformers(tmp_path):
    found = generate("llama", tmp_path, "float32", "bfloat16")
    assert "treeflash_cuda.decoder.model" in found
    assert not found & MODELS


# Six seconds; a target that ran without them would fail in every other test.
@pytest.mark.nightly
def test_another_target_imports_the_models_of_transformers(tmp_path):
    """The names above are still names of what transformers imports."""
    found = generate("qwen3_5", tmp_path, "float32")
    assert MODELS - {"accelerate", "torchvision"} <= found  # these two may not be installed


def test_the_help_of_a_command_imports_no_framework():
    assert not modules_of(("generate", "--help")) & {"torch", "transformers"}
