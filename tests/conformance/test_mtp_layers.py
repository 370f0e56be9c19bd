"""The reference's layers of MTP heads with experts and latents against transformers' own."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mtp_pairs import write_mtp_pair
from published_drafters import FLOAT32

from treeflash.drafters.folder import read_config, read_tensors
from treeflash.registry import loader

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILIES = {"qwen-experts": "Qwen3Next", "glm": "Glm4Moe", "glm-latents": "DeepseekV3"}
"""By kind, how the names of transformers' classes begin."""


def theirs(kind: str, head: Path) -> tuple[Any, Any]:
    """Return transformers' rotary embedding and last layer, with the weights of a head."""
    settings = read_config(head)
    settings |= {"first_k_dense_replace": 0, "layer_types": ["full_attention"] * 4}
    if kind == "glm-latents":
        del settings["head_dim"]  # the width of rotary keys
    config = transformers.AutoConfig.for_model(**settings, attn_implementation="eager")
    module = import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    layer = getattr(module, f"{FAMILIES[kind]}DecoderLayer")(config, 3).eval()
    prefix = "mtp.layers.0." if kind == "qwen-experts" else "model.layers.4."
    tensors = {
        name.removeprefix(prefix): torch.tensor(x)
        for name, x in read_tensors(head).items()
        if name.startswith(prefix)
    }
    experts = {x: [] for x in ("gate_proj", "up_proj", "down_proj")}
    for part, stacked in experts.items():
        while (name := f"mlp.experts.{len(stacked)}.{part}.weight") in tensors:
            stacked.append(tensors[name])
    gate, up, down = map(torch.stack, experts.values())
    tensors |= {"mlp.experts.gate_up_proj": torch.cat([gate, up], 1), "mlp.experts.down_proj": down}
    missing, _ = layer.load_state_dict(tensors, strict=False)
    assert not missing
    return getattr(module, f"{FAMILIES[kind]}RotaryEmbedding")(config), layer


@pytest.mark.parametrize("kind", FAMILIES)
def test_layers_compute_what_transformers_does(kind: str, tmp_path: Path) -> None:
    target, head = write_mtp_pair(tmp_path, kind)
    ours: Any = loader("reference")(target, head, FLOAT32).drafter_model
    rotary, layer = theirs(kind, head)
    n = 9
    x = np.random.default_rng(0).normal(size=(n, 32)).astype(np.float32)
    positions, seen = np.arange(n, dtype=np.int32), np.tri(n, dtype=np.bool_)
    y = ours.normed("layer.input_layernorm", x)
    keys, values = ours.keys_and_values("layer.", y, positions)
    found = ours.layer((y, x), positions, keys, values, seen)
    rows, ids = torch.tensor(x)[None], torch.arange(n)[None]
    with torch.inference_mode():
        mask = torch.zeros(n, n).masked_fill(~torch.tensor(seen), -torch.inf)[None, None]
        expected = layer(
            rows, position_embeddings=rotary(rows, ids), attention_mask=mask, position_ids=ids
        )[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
