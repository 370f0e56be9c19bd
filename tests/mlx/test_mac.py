"""The benchmark for Macs, on whatever device MLX has here."""

import json

from treeflash.testing import require
from treeflash.testing.models import write_drafter, write_target
from treeflash.testing.tokenizer import save_tokenizer

require("mlx.core")
require("mlx_lm")


def test_one_command_measures_everything(module, tmp_path):
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    write_target(target, "llama", seed=3, vocab_size=300)
    save_tokenizer(target)
    write_drafter(drafter, target, seed=4)
    file = tmp_path / "out.json"
    options = ["--target", str(target), "--drafter", str(drafter), "--json", str(file)]
    options += ["--sizes", "1,3", "--contexts", "2,5", "--repeats", "1", "--max-tokens", "4"]
    assert module("mac").main(options) == 0
    found = json.loads(file.read_text())
    assert found["benchmark"] == "mac"
    assert [(row["context"], row["nodes"]) for row in found["verify"]] == [
        (2, 1),
        (2, 3),
        (5, 1),
        (5, 3),
    ]
    assert found["host"][0]["host_ms"] > 0
    methods = [row["method"] for row in found["iterations"]]
    assert methods == ["ar", "dflash", "ddtree", "treeflash", "treeflash-chain"]
    assert [row["method"] for row in found["speed"]] == [*methods, "generate"]
    assert all(row["tokens_per_s"] > 0 for row in found["speed"])
