"""Block drafters in folders that mlx-vlm has quantised in groups, on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.drafters.formats import unknown_keys
from treeflash.registry import loader
from treeflash.testing import models
from treeflash.testing.comparisons import generate
from treeflash.testing.models import edit_config, save, write_dialect, write_target

pytestmark = pytest.mark.sample(3)

PACKAGES = {"reference": "numpy", "cuda": "torch", "mlx": "mlx_lm"}
GROUP = 32
SETTINGS = {"group_size": GROUP, "bits": 4, "mode": "affine"}
WIDE = "layers.0.mlp.up_proj"
"""The layer with eight bits, when the others have four."""
DIALECTS = "dflash2", "gated queries", "speculators-dspark"


def quantised(weight: NDArray[Any], bits: int) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
    """The tensors that MLX stores for a weight, and the numbers that they stand for."""
    groups = weight.reshape(len(weight), -1, GROUP)
    biases = groups.min(-1, keepdims=True)
    scales = (groups.max(-1, keepdims=True) - biases) / (2**bits - 1)
    integers = np.rint((groups - biases) / scales).astype(np.uint8)
    stream = np.unpackbits(integers[..., None], axis=-1, count=bits, bitorder="little")
    words = np.packbits(stream.reshape(len(weight), -1), axis=-1, bitorder="little").view("<u4")
    parts = {"weight": words, "scales": scales[..., 0], "biases": biases[..., 0]}
    return parts, (scales * integers + biases).reshape(weight.shape)


def write_quantised(folder: Path, original: Path) -> None:
    """Quantise a drafter into a folder, and write the numbers that are left over the original."""
    config, numbers = read_config(original), read_tensors(original)
    stored: dict[str, Any] = {}
    for name, weight in list(numbers.items()):
        if weight.ndim == 2 and weight.shape[1] % GROUP == 0:
            base = name.removesuffix(".weight")  # codebooks have no such suffix
            parts, numbers[name] = quantised(weight, 8 if base == WIDE else 4)
            stored |= {f"{base}.{part}": array for part, array in parts.items()}
        else:
            stored[name] = weight
    save(original, config, numbers)
    settings = SETTINGS | {WIDE: SETTINGS | {"bits": 8}}
    save(folder, config | {"quantization": settings, "quantization_config": settings}, stored)


def gate_queries(folder: Path) -> None:
    """Give a drafter of DeepSpec the queries of Qwen3.5, a part of which is rotated."""
    edit_config(
        folder,
        lambda c: c.update(
            architectures=["Qwen35DSparkModel"],
            enable_qwen35_gated_q_proj=True,
            rope_parameters={"rope_theta": 1000.0, "partial_rotary_factor": 0.5},
        ),
    )
    tensors = read_tensors(folder)
    for name, weight in tensors.items():
        if name.endswith("q_proj.weight"):
            tensors[name] = np.concatenate([weight, weight[::-1]])
    save(folder, read_config(folder), tensors)


@pytest.fixture(scope="module", params=DIALECTS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[NDArray[np.float32]]]:
    """A folder with a target and a quantised drafter, and the dequantised one's scores."""
    root = tmp_path_factory.mktemp("quantised")
    write_target(root / "target", "qwen3", seed=0)
    gated = request.param == "gated queries"
    with pytest.MonkeyPatch.context() as patch:  # wide enough to be quantised
        patch.setattr(models, "RANK", GROUP)
        patch.setitem(models.SELECTOR, "selector_rank", GROUP)
        dialect = "deepspec" if gated else request.param
        write_dialect(root / "plain", root / "target", dialect, seed=1)
    if gated:
        gate_queries(root / "plain")
    write_quantised(root / "quantised", root / "plain")
    options = LoadConfig(device="cpu", dtype="float32")
    return root, scores(loader("reference")(root / "target", root / "plain", options))


def scores(pair: Any) -> list[NDArray[np.float32]]:
    """The log probabilities of the marginals, and of the head."""
    with SequenceSession(pair, drafts=True) as sequence:
        sequence.extend([1, 2, 3, 4, 5])
        block = sequence.draft(6)
        previous = np.full(pair.drafter_config.depths, 7, np.int32)
        return [pair.drafter.log_probs(block), pair.head.log_probs(block, previous)]


def text(pair: Any, method: Any) -> list[int]:
    return generate(pair, [1, 2, 3], DecodeConfig(method=method, max_tokens=8))


@pytest.mark.parametrize(
    ("backend", "bits"), [("reference", None), ("cuda", None), ("mlx", None), ("mlx", 8)]
)
def test_a_quantised_drafter_drafts_as_its_numbers(backend, bits, written):
    """On MLX, layers with at most `bits` bits stay in their groups; the numbers are the same."""
    pytest.importorskip(PACKAGES[backend])
    root, expected = written
    options = LoadConfig(device="cpu", dtype="float32", draft_bits=bits)
    pair = loader(backend)(root / "target", root / "quantised", options)
    if backend == "mlx":
        layer = pair.drafter_model.layers[0]
        parts = [layer.self_attn.q_proj, layer.mlp.up_proj]
        assert [getattr(x, "bits", None) for x in parts] == ([4, 8] if bits else [None, None])
    for actual, right in zip(scores(pair), expected, strict=True):
        np.testing.assert_allclose(actual, right, atol=1e-4)
    assert text(pair, "treeflash") == text(pair, "ar")
    assert "quantization" not in unknown_keys(read_config(root / "quantised"))
