"""LoRA adapters: what their formats say, and models that they are merged into."""

import json
from dataclasses import replace

import numpy as np
import pytest
from published_drafters import BACKENDS, FLOAT32
from safetensors.numpy import load_file, save_file

from treeflash.config import DecodeConfig
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.adapter import read_adapter
from treeflash.errors import CheckpointError, TreeflashError, UnsupportedModelError
from treeflash.language_model import locate
from treeflash.registry import loader
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_drafter, write_target

PREFIX = "base_model.model."
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head")
PEFT = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", "use_dora": False}
MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 2.5, "dropout": 0.0}}


def matrices(target):
    """Random A (r, in) and B (out, r) of some layers."""
    rng, weights = np.random.default_rng(0), load_file(target / "model.safetensors")
    pairs = {}
    for name in MODULES:
        out, width = weights[f"{name}.weight"].shape
        shapes = (3, width), (out, 3)
        pairs[name] = tuple(rng.normal(0, 0.3, shape).astype(np.float32) for shape in shapes)
    return pairs  # type: ignore[return-value]


def write_adapter(folder, kind, target, config):
    """An adapter as PEFT or mlx-lm saves it."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for name, (a, b) in matrices(target).items():
        if kind == "peft":
            tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
        else:
            tensors |= {f"{name}.lora_a": a.T.copy(), f"{name}.lora_b": b.T.copy()}
    file = "adapter_model.safetensors" if kind == "peft" else "adapters.safetensors"
    save_file(tensors, folder / file)


def merge_by_hand(target, merged, scale):
    """The same target with W + scale * B A."""
    write_target(merged, "qwen3", seed=3)
    weights = load_file(target / "model.safetensors")
    for name, (a, b) in matrices(target).items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + np.float32(scale) * (b @ a)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def target(tmp_path):
    write_target(tmp_path / "target", "qwen3", seed=3)
    return tmp_path / "target"


@pytest.mark.sample(2)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "config", "scale"), [("peft", PEFT, 2.0), ("mlx", MLX, 2.5)])
def test_merged_models_compute_with_w_plus_scale_b_a(
    tmp_path, target, backend, kind, config, scale
):
    require(BACKENDS[backend])
    write_adapter(tmp_path / "adapter", kind, target, config)
    merge_by_hand(target, tmp_path / "merged", scale)
    write_drafter(tmp_path / "drafter", target, seed=4)
    load, with_adapter = loader(backend), replace(FLOAT32, adapter=str(tmp_path / "adapter"))
    merged = load(target, tmp_path / "drafter", with_adapter)
    by_hand, base = (load(x, None, FLOAT32) for x in (tmp_path / "merged", target))
    tree = DraftTree.chain(np.arange(5, dtype=np.int32))
    actual, expected, unmerged = (SequenceSession(x).logits(tree) for x in (merged, by_hand, base))
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert np.abs(actual - unmerged).max() > 0.1
    drafted = DecodeConfig(method="treeflash", budget=16, max_tokens=16)
    plain = DecodeConfig(method="ar", max_tokens=16)
    assert generate(merged, [1, 2, 3], drafted) == generate(by_hand, [1, 2, 3], plain)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [2.0, 2.0, 2.0]),
        ({"use_rslora": True}, [6 / 3**0.5] * 3),
        ({"alpha_pattern": {"q_proj": 12}}, [4.0, 2.0, 2.0]),
        ({"alpha_pattern": {r"layers\.1\..*": 3}}, [2.0, 1.0, 2.0]),
        ({"alpha_pattern": {r"^model\.layers\.1\..*": 3}}, [2.0, 1.0, 2.0]),
    ],
)
def test_scales_of_peft(tmp_path, target, changes, expected):
    write_adapter(tmp_path / "adapter", "peft", target, PEFT | changes)
    updates = {update.name: update for update in read_adapter(tmp_path / "adapter")}
    assert [updates[name].scale for name in MODULES] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        *(
            ("peft", {name: value}, f"adapters with {name} are not supported")
            for name, value in (
                ("use_dora", True),
                ("modules_to_save", ["lm_head"]),
                ("lora_bias", True),
                ("target_parameters", ["experts.down_proj"]),
                ("fan_in_fan_out", True),
                ("alora_invocation_tokens", [1, 2]),
            )
        ),
        ("peft", {"bias": "all"}, "adapters with bias 'all' are not supported"),
        ("peft", {"peft_type": "IA3"}, "adapters of type IA3 are not supported; use LoRA"),
        *(
            ("peft", {"init_lora_weights": start}, "change the base model")
            for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA")
        ),
        ("mlx", {"fine_tune_type": "dora"}, "adapters of type 'dora' are not supported"),
        ("mlx", {"fine_tune_type": "full"}, "adapters of type 'full' are not supported"),
        ("peft", {"lora_alpha": None}, "adapter_config.json has no lora_alpha"),
        ("mlx", {"lora_parameters": {"rank": 3}}, "has no scale in lora_parameters"),
    ],
)
def test_other_adapters_are_refused(tmp_path, target, kind, changes, message):
    write_adapter(tmp_path / "adapter", kind, target, (PEFT if kind == "peft" else MLX) | changes)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=message):
        read_adapter(tmp_path / "adapter")


def test_an_adapter_for_another_base_model_is_warned_of(tmp_path, target, caplog):
    write_adapter(tmp_path / "adapter", "peft", target, PEFT | {"base_model_name_or_path": "a/b"})
    adapter = str(tmp_path / "adapter")
    locate(target, False, backend="reference", adapter=adapter)
    assert f"was trained for a/b, but is merged into {target.name}" in caplog.text


def test_unknown_and_missing_tensors_are_refused(tmp_path, target):
    write_adapter(tmp_path / "adapter", "peft", target, PEFT)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight"
    save_file(tensors | {name: np.ones(4, np.float32)}, file)
    with pytest.raises(UnsupportedModelError, match="lora_magnitude_vector"):
        read_adapter(tmp_path / "adapter")
    _, *others = sorted(tensors)
    save_file({key: tensors[key] for key in others}, file)
    with pytest.raises(CheckpointError, match="only one of the two matrices"):
        read_adapter(tmp_path / "adapter")
    save_file({}, file)
    with pytest.raises(CheckpointError, match="has no LoRA matrices"):
        read_adapter(tmp_path / "adapter")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="save the adapter as safetensors"):
        read_adapter(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="has no adapter_config"):
        read_adapter(target)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_the_target_lacks_are_refused(tmp_path, target, backend):
    require(BACKENDS[backend])
    write_adapter(tmp_path / "adapter", "peft", target, PEFT)
    write_target(tmp_path / "tied", "qwen3", seed=3, tied=True)
    config = replace(FLOAT32, adapter=str(tmp_path / "adapter"))
    with pytest.raises(TreeflashError, match="the adapter cannot be merged into lm_head: "):
        loader(backend)(tmp_path / "tied", None, config)
