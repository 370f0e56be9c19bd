"""The reference's sliding windows against transformers, for what configurations leave unsaid."""

import json

import numpy as np
import pytest

from treeflash.reference.target import Target
from treeflash.testing import require
from treeflash.testing.models import write_target

require("torch")

import torch
from transformers import AutoModelForCausalLM

CASES = {
    "qwen2 slides from a layer on": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3 slides from a layer on": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3_moe slides everywhere": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6}),
    "a window that is not used": ("qwen2", {"use_sliding_window": False, "sliding_window": 6}),
    "mistral slides": ("mistral", {"sliding_window": 6}),
    "mistral told not to": ("mistral", {"sliding_window": None}),
    "layers named one by one": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_windows_are_those_of_transformers(case, tmp_path):
    family, settings = CASES[case]
    write_target(tmp_path, family, seed=1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    tokens = np.random.default_rng(2).integers(0, 24, 20).astype(np.int32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    target = Target(tmp_path)
    positions = np.arange(20, dtype=np.int32)
    logits, _ = target.forward(tokens, positions, np.tri(20, dtype=np.bool_), target.new_cache())
    np.testing.assert_allclose(logits, expected, atol=1e-4)
