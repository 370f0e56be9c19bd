"""Published checkpoints with the numbers that the published code computes from them.

They lie outside this repository, in several folders beside each other, of which
`TREEFLASH_DRAFTER_FIXTURES` names any one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from treeflash.config import LoadConfig
from treeflash.registry import loader

FIXTURES = Path(os.environ.get("TREEFLASH_DRAFTER_FIXTURES", ".")).resolve().parent
ROOT = FIXTURES / "more-drafters"
NEWER = {
    "deepseek_v3-mtp": "deepseek_v3-target",
    "deepspec-eagle3": "plain-target",
    "dflash-sinks": "plain-target",
    "dspark-sinks": "plain-target",
    "eagle3-window": "plain-target",
    "gemma4-dspark": "gemma4-target",
    "glm4_moe_lite-mtp": "glm4_moe_lite-mtp",
    "gemma4-dspark-plain": "plain-target",
    "muse-glimmer-assistant": "muse-target",
    "muse-glimmer-assistant-plain": "plain-target",
    "qwen3_5-mtp-quantised": "qwen3_5-target",
    "speculators-mtp": "qwen3_5-target",
    "speculators-peagle": "plain-target",
}
"""Drafters of a second folder, with their targets."""
TARGETS = NEWER | {
    "eagle3": "eagle3-target",
    "speculators-eagle3": "eagle3-target",
    "gemma4-assistant": "gemma4-target",
}
BACKENDS = {"reference": "numpy", "cuda": "torch", "mlx": "mlx_lm"}
"""And the package that each needs."""
TOLERANCE = 1e-4
FLOAT32 = LoadConfig(device="cpu", dtype="float32")
needs_fixtures = pytest.mark.skipif(
    "TREEFLASH_DRAFTER_FIXTURES" not in os.environ,
    reason="TREEFLASH_DRAFTER_FIXTURES does not name the folder of published drafters",
)


def load_published(backend: str, name: str) -> Any:
    pytest.importorskip(BACKENDS[backend])
    folder = published(name)
    return loader(backend)(folder.parent / TARGETS.get(name, name), folder, FLOAT32)


def published(name: str) -> Path:
    return (FIXTURES / "drafters-2" if name in NEWER else ROOT) / name


def cases(name: str) -> list[tuple[dict[str, Any], dict[str, NDArray[Any]]]]:
    texts = json.loads((published(name) / "expected.json").read_text())["texts"]
    arrays = np.load(published(name) / "expected.npz")
    of_text = [
        {k[:-2]: arrays[k] for k in arrays if k.endswith(f".{i}")} for i in range(len(texts))
    ]
    assert texts, "most tests go through the cases"
    return list(zip(texts, of_text, strict=True))
