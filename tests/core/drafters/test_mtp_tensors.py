"""The tensors of heads that draft depth by depth: their names in files, and how they are loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.drafters import mtp_heads
from treeflash.drafters.folder import read_file, read_quantised
from treeflash.drafters.loading import read_layout
from treeflash.drafters.mtp_formats import ASSISTANT, EAGLE3, GLM_MTP, QWEN_MTP, QWEN_SIDECAR
from treeflash.drafters.mtp_tensors import mtp_shapes, split_fused, stack_experts
from treeflash.errors import CheckpointError, ConfigError, UnsupportedModelError
from treeflash.testing.models import save

FORMATS = Path(__file__).parent / "formats"


def published(name: str) -> dict[str, Any]:
    """Read the configuration of a dialect."""
    config: dict[str, Any] = json.loads((FORMATS / name / "config.json").read_text("utf-8"))
    return config


EAGLE, QWEN = published("eagle3"), published("qwen-mtp")
QWEN_MOE = QWEN | {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 5,
    "shared_expert_intermediate_size": 6,
}


def test_stacked_experts_of_mlx():
    """A side file has them under `switch_mlp`; each has the shape of a single expert."""
    name = "layers.0.mlp.switch_mlp.gate_proj.weight"
    canonical = QWEN_SIDECAR.names({}, [name])[name]
    assert canonical == "layer.mlp.experts.gate_proj"
    stacked = {canonical: (3, 5, 8), "layer.mlp.experts.down_proj": (3, 8, 5)}
    stacked["layer.mlp.experts.up_proj"] = (3, 5, 8)
    split = split_fused(stacked)
    assert split["layer.mlp.experts.2.gate_proj.weight"] == (5, 8)
    assert split["layer.mlp.experts.0.down_proj.weight"] == (8, 5)
    assert len(split) == 9
    zeros = {key: np.zeros(shape) for key, shape in stacked.items()}
    config = QWEN_SIDECAR.parse(QWEN_MOE, ("layers.0.mlp.gate.weight",), 12)
    assert stack_experts(dict(zeros), config, np.stack).keys() == zeros.keys()


def write_eagle(folder: Path, **changes: Any) -> dict[str, Any]:
    """A head without its embeddings and output head, which it shares with the target."""
    config = {**EAGLE, **changes}
    optional = ("embed_tokens.weight", "lm_head.weight")
    stored = {
        name: np.zeros(shape, np.float32)
        for name, shape in mtp_shapes(EAGLE3.parse(config, (), 12), 10).items()
        if name not in optional
    }
    save(folder, config, stored)
    return {"config": config, "stored": stored}


def load(folder: Path, **changes: int) -> Any:
    target = {"hidden_size": 8, "vocab_size": 10, "num_hidden_layers": 12, **changes}
    layout = read_layout(folder, **target)
    tensors = layout.read(read_file, read_quantised, np.stack)
    weights, vocabulary = tensors.backbone, tensors.vocabulary
    return SimpleNamespace(config=layout.config, weights=weights, vocabulary=vocabulary)


def test_a_head_fits_its_target(tmp_path):
    write_eagle(tmp_path / "head")
    found = load(tmp_path / "head")
    assert not found.vocabulary
    assert found.weights.keys() == mtp_shapes(found.config, 10).keys() - {
        "embed_tokens.weight",
        "lm_head.weight",
    }
    for changes, problem in (
        ({"hidden_size": 16}, "its hidden size is 8, the target's is 16"),
        ({"vocab_size": 11}, "its vocabulary has 10 tokens, the target's has 11"),
        ({"num_hidden_layers": 2}, r"it reads target layers \[1, 0, -2\], the target has 2"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            load(tmp_path / "head", **changes)
    mtp = {"num_hidden_layers": 11}
    write_eagle(tmp_path / "embeddings", eagle_aux_hidden_state_layer_ids=[0, 5, 9])
    assert load(tmp_path / "embeddings").config.target_layer_ids == (-1, 4, 8)
    save(
        tmp_path / "mtp",
        QWEN,
        {
            name: np.zeros(1, np.float32)
            for name in ("mtp.fc.weight", "mtp.pre_fc_norm_hidden.weight")
        },
    )
    with pytest.raises(CheckpointError, match="a target of 12 layers, this one has 11"):
        load(tmp_path / "mtp", **mtp)


def test_tensors_of_a_head_are_checked(tmp_path):
    folder = tmp_path / "head"
    parts = write_eagle(folder)

    def refused(problem: str, remove: str | None = None, **changes: Any) -> None:
        stored = {k: x for k, x in (parts["stored"] | changes).items() if k != remove}
        save(folder, parts["config"], stored)
        with pytest.raises(CheckpointError, match=re.escape(problem)):
            load(folder)

    zeros = np.zeros((2, 2), np.float32)
    refused("lacks the tensor norm.weight of shape (8,)", remove="norm.weight")
    wrong = "tensor fc.weight has shape (2, 2), config.json asks for (8, 24)"
    refused(wrong, **{"fc.weight": zeros})
    refused("an unexpected tensor for an MTP or EAGLE-3 head: extra", extra=zeros)
    refused("tensors of type I8", **{"fc.weight": np.zeros((8, 24), np.int8)})
    packed = {"quantization": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}
    words = {"fc.weight": np.zeros((8, 2), np.uint32)}
    words |= {"pre_fc_norm_hidden.weight": np.zeros(1, np.float32)}
    save(folder, {**QWEN, **packed, "model_type": "qwen3_5_mtp"}, words)
    with pytest.raises(CheckpointError, match="mode 'nvfp4'; the mode 'affine' is supported"):
        load(folder)
    save(folder, {k: x for k, x in EAGLE.items() if k != "vocab_size"}, parts["stored"])
    with pytest.raises(CheckpointError, match=r"config\.json lacks 'vocab_size'"):
        load(folder)
    save(folder, {**EAGLE, "hidden_size": "wide"}, parts["stored"])
    with pytest.raises(CheckpointError, match=r"config\.json is not valid: "):
        load(folder)
    own = write_eagle(folder, draft_vocab_size=7)
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        load(folder)
    head = {"lm_head.weight": np.ones((7, 8), np.float32)}
    save(folder, own["config"], own["stored"] | {"d2t": np.zeros(7, np.int64)} | head)
    assert load(folder).vocabulary.keys() == {"lm_head.weight", "d2t"}


@pytest.mark.parametrize("fused", [False, True])
def test_experts_are_stacked(tmp_path, fused):
    """They may be stored together, gates before the others."""
    rng = np.random.default_rng(0)
    names = ("mtp.layers.0.mlp.gate.weight",)
    shapes = mtp_shapes(QWEN_MTP.parse(QWEN_MOE, names, 12), 10)
    renamed = {"input_proj": "fc", "hidden_norm": "pre_fc_norm_hidden"}
    renamed |= {"embedding_norm": "pre_fc_norm_embedding", "layer": "layers.0"}
    stored = {}
    for name, shape in shapes.items():
        first, _, rest = name.partition(".")
        stored[f"mtp.{renamed.get(first, first)}.{rest}"] = rng.normal(size=shape).astype("f4")
    prefix, parts = "mtp.layers.0.mlp.experts.", ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (
        np.stack([stored[f"{prefix}{i}.{name}.weight"] for i in range(3)]) for name in parts
    )
    if fused:
        stored = {name: x for name, x in stored.items() if not name.startswith(prefix)}
        stored |= {f"{prefix}gate_up_proj": np.concatenate([gate, up], 1)}
        stored |= {f"{prefix}down_proj": down}
    save(tmp_path / "head", QWEN_MOE, stored)
    weights = load(tmp_path / "head").weights
    for name, expected in zip(parts, (gate, up, down), strict=True):
        np.testing.assert_array_equal(weights[f"layer.mlp.experts.{name}"], expected)
    assert not [name for name in weights if name.startswith("layer.mlp.experts.0")]


def test_what_only_some_backends_and_drafters_have():
    assistant = ASSISTANT.parse(published("gemma4-assistant"), (), 12)
    latent = GLM_MTP.parse(published("glm-mtp-latent"), (), 12)
    mtp_heads.refuse_window(LoadConfig())
    with pytest.raises(ConfigError, match="draft_window is not supported"):
        mtp_heads.refuse_window(LoadConfig(draft_window=8))
    mtp_heads.refuse_missing_targets(QWEN_MTP.parse(QWEN, (), 12), "reference")
    with pytest.raises(UnsupportedModelError, match="by the reference backend; use the mlx"):
        mtp_heads.refuse_missing_targets(assistant, "reference")
    with pytest.raises(
        UnsupportedModelError, match="latent attention is not supported by the cuda"
    ):
        mtp_heads.refuse_missing_targets(latent, "cuda")
