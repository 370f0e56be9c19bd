"""Block drafters of the dialects: their tensors, what backends refuse, and what they compute."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.drafters.backbone import default_target_layer_ids
from treeflash.drafters.folder import read_config, read_file, read_tensors
from treeflash.drafters.loading import drafter_config, load_tensors, refuse_extensions
from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash.registry import loader
from treeflash.testing.models import DIALECTS, edit_config, save, write_dialect, write_target

Config = dict[str, Any]
TARGET = {"hidden_size": 32, "vocab_size": 24, "num_hidden_layers": 4}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    write_target(tmp_path / "target", "qwen3", seed=0)

    def write(dialect: str) -> Path:
        write_dialect(tmp_path / "dialect", tmp_path / "target", dialect, seed=1)
        return tmp_path / "dialect"

    return write


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_dialect_passes_for_dflash(write, dialect):
    with pytest.raises(UnsupportedModelError, match=r"^a test does not support a drafter with \w"):
        refuse_extensions(drafter_config(write(dialect)), "a test")


def test_a_backend_names_what_it_has_beyond_dflash(write):
    config = drafter_config(write("deepspec"))
    own = {"heads": ("vanilla",), "supported": ("first_slot", "own_vocabulary")}
    with pytest.raises(UnsupportedModelError, match="with features of the embeddings"):
        refuse_extensions(config, "a test", **own)
    own["supported"] += ("target_layer_ids",)
    refuse_extensions(config, "a test", **own)
    with pytest.raises(UnsupportedModelError, match="with a factor on its embeddings"):
        refuse_extensions(replace(config, input_scale=2.0), "a test", **own)


def test_copies_of_the_target_may_be_left_out(write):
    folder = write("deepspec-dflash")
    assert load_tensors(folder, read_file, **TARGET).vocabulary.keys() == {
        "embed_tokens.weight",
        "lm_head.weight",
    }
    tensors = read_tensors(folder)
    del tensors["embed_tokens.weight"], tensors["lm_head.weight"]
    save(folder, read_config(folder), tensors)
    loaded = load_tensors(folder, read_file, **TARGET)
    assert loaded.vocabulary == {}
    assert loaded.config.first_slot == 0  # though it looks like z-lab's DFlash


@pytest.mark.parametrize("name", ["d2t", "lm_head.weight", "markov_head.markov_w1.weight"])
def test_a_missing_tensor_is_named(write, name):
    folder = write("speculators-dspark")
    tensors = read_tensors(folder)
    del tensors[name]
    save(folder, read_config(folder), tensors)
    with pytest.raises(CheckpointError, match=f"lacks the tensor {name} of shape"):
        load_tensors(folder, read_file, **TARGET)


@pytest.mark.parametrize("rank", [-1, 10**18])
def test_a_size_that_no_tensor_has_is_a_misfit(write, rank):
    folder = write("deepspec")
    edit_config(folder, lambda c: c.update(markov_rank=rank))
    with pytest.raises(CheckpointError, match=rf"markov_w1\.weight has shape .*, {rank}\)"):
        load_tensors(folder, read_file, **TARGET)


def test_a_mask_embedding_is_refused(write):
    folder = write("dflash")
    (folder / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"mask_embedding\.pt, which is not supported"):
        drafter_config(folder)


@pytest.mark.parametrize(
    ("target_layers", "layers", "ids"),
    [
        (36, 5, (1, 9, 17, 25, 33)),  # Qwen3-4B and Qwen3-8B
        (48, 8, (1, 7, 14, 20, 26, 32, 39, 45)),
        (30, 3, (1, 14, 27)),
        (36, 1, (18,)),
        (7, 1, (3,)),
        (5, 2, (1, 2)),
        # The eighth is exactly 31.5, which `round` makes even.
        (65, 15, (1, 5, 10, 14, 18, 23, 27, 32, 36, 40, 45, 49, 53, 58, 62)),
    ],
)
def test_default_target_layer_ids(target_layers, layers, ids):
    assert default_target_layer_ids(target_layers, layers) == ids


@pytest.mark.parametrize("backend", ["reference", "cuda", "mlx"])
def test_interleaved_rotary_embeddings_of_lfm2(backend, tmp_path):
    """The same drafter with the channels of its heads in the other order drafts the same."""
    pytest.importorskip({"reference": "numpy", "cuda": "torch", "mlx": "mlx_lm"}[backend])
    write_target(tmp_path / "target", "qwen3", seed=0)
    write_dialect(tmp_path / "halves", tmp_path / "target", "deepspec", seed=1)
    config, tensors = read_config(tmp_path / "halves"), read_tensors(tmp_path / "halves")
    d = config["head_dim"]
    for name, tensor in tensors.items():
        if re.search(r"\.[qk]_(proj|norm)\.", name):
            halves = tensor.reshape(-1, 2, d // 2, *tensor.shape[1:])
            tensors[name] = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
    config |= {"architectures": ["Lfm2DSparkDraftModel"], "rope_is_neox_style": False}
    save(tmp_path / "pairs", config, tensors)
    log_probs = []
    for name in ("halves", "pairs"):
        options = LoadConfig(device="cpu", dtype="float32")
        pair = loader(backend)(tmp_path / "target", tmp_path / name, options)
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend([1, 2, 3, 4, 5])
            log_probs.append(pair.drafter.log_probs(sequence.draft(6)))
    np.testing.assert_allclose(*log_probs, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cuda", "mlx"])
def test_a_mask_beyond_the_targets_vocabulary(backend, tmp_path):
    """Its embedding is used, and other tokens that the target lacks change nothing."""
    pytest.importorskip({"reference": "numpy", "cuda": "torch", "mlx": "mlx_lm"}[backend])
    write_target(tmp_path / "target", "qwen3", seed=0)
    write_dialect(tmp_path / "same", tmp_path / "target", "deepspec", seed=1)
    config, tensors = read_config(tmp_path / "same"), read_tensors(tmp_path / "same")
    vocab_size, mask = config["vocab_size"], config["mask_token_id"]
    rng = np.random.default_rng(2)
    for name, tensor in tensors.items():
        if len(tensor) == vocab_size:
            rows = rng.normal(size=(3, tensor.shape[1])).astype(np.float32)
            tensors[name] = np.concatenate([tensor, rows])
    embeddings = tensors["embed_tokens.weight"]
    embeddings[vocab_size + 1] = embeddings[mask]
    config |= {"vocab_size": vocab_size + 3, "mask_token_id": vocab_size + 1}
    save(tmp_path / "wide", config, tensors)
    options = LoadConfig(device="cpu", dtype="float32")
    found = []
    for name in ("same", "wide"):
        pair = loader(backend)(tmp_path / "target", tmp_path / name, options)
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend([1, 2, 3, 4, 5])
            block = sequence.draft(6)
            previous = np.full(pair.drafter_config.depths, 7, np.int32)
            found.append((pair.drafter.log_probs(block), pair.head.log_probs(block, previous)))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    del tensors["embed_tokens.weight"]
    save(tmp_path / "wide", config, tensors)
    with pytest.raises(CheckpointError, match="its vocabulary has 27 tokens, the target's has 24"):
        loader(backend)(tmp_path / "target", tmp_path / "wide", options)


def write_gated(folder: Path) -> tuple[Config, dict[str, np.ndarray[Any, Any]]]:
    """Write a small target, and a random drafter whose layers are Qwen3.5's."""
    write_target(folder / "target", "qwen3", seed=0)
    write_dialect(folder / "drafter", folder / "target", "deepspec", seed=1)
    config, tensors = read_config(folder / "drafter"), read_tensors(folder / "drafter")
    config |= {
        "architectures": ["Qwen35DSparkModel"],
        "enable_qwen35_gated_q_proj": True,
        "rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    }
    rng = np.random.default_rng(2)
    for name, x in tensors.items():
        if name.endswith("q_proj.weight"):
            size = 2 * len(x), x.shape[1]
            tensors[name] = rng.normal(scale=0.5, size=size).astype(np.float32)
        if name.endswith("norm.weight"):
            tensors[name] = rng.normal(scale=0.3, size=x.shape).astype(np.float32)
    save(folder / "drafter", config, tensors)
    return config, tensors


def gated_block(
    config: Config, stored: dict[str, Any], features: np.ndarray[Any, Any], root: int
) -> np.ndarray[Any, Any]:
    """(S, vocab) log probabilities of a block, by the published formula on the stored tensors."""
    t = {name.removeprefix("model."): x.astype(np.float64) for name, x in stored.items()}
    d, kv_heads, p = config["head_dim"], config["num_key_value_heads"], len(features)

    def norm(name: str, x: Any) -> Any:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / scale * (1 + t[f"{name}.weight"])

    def linear(name: str, x: Any) -> Any:
        return x @ t[f"{name}.weight"].T

    def rotated(x: Any, first: int) -> Any:
        turned = d // 2
        angles = (first + np.arange(len(x)))[:, None, None] * 1000.0 ** -(
            np.arange(0, turned, 2) / turned
        )
        a, b, rest = x[..., : turned // 2], x[..., turned // 2 : turned], x[..., turned:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def sigmoid(x: Any) -> Any:
        return 1 / (1 + np.exp(-x))

    context = norm("hidden_norm", linear("fc", features))
    tokens = [root] + [config["mask_token_id"]] * (config["block_size"] - 1)
    x = t["embed_tokens.weight"][tokens]
    for n in range(config["num_hidden_layers"]):
        layer, own = f"layers.{n}.", f"layers.{n}.self_attn."
        y = norm(layer + "input_layernorm", x)
        rows = np.concatenate([context, y])
        both = linear(own + "q_proj", y).reshape(len(y), -1, 2 * d)
        q = rotated(norm(own + "q_norm", both[..., :d]), p)
        keys = linear(own + "k_proj", rows).reshape(len(rows), kv_heads, d)
        k = rotated(norm(own + "k_norm", keys), 0)
        v = linear(own + "v_proj", rows).reshape(len(rows), kv_heads, d)
        k, v = (z.repeat(q.shape[1] // kv_heads, 1) for z in (k, v))
        scores = np.exp(np.einsum("ihd,jhd->hij", q, k) * d**-0.5)
        out = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), v)
        out = out * sigmoid(both[..., d:])
        x = x + linear(own + "o_proj", out.reshape(len(y), -1))
        y = norm(layer + "post_attention_layernorm", x)
        gate = linear(layer + "mlp.gate_proj", y)
        x = x + linear(
            layer + "mlp.down_proj", gate * sigmoid(gate) * linear(layer + "mlp.up_proj", y)
        )
    logits = linear("lm_head", norm("norm", x))
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


@pytest.mark.parametrize("backend", ["reference", "cuda", "mlx"])
def test_gated_queries_follow_the_published_formula(backend, tmp_path):
    pytest.importorskip({"reference": "numpy", "cuda": "torch", "mlx": "mlx_lm"}[backend])
    config, tensors = write_gated(tmp_path)
    features, paths = [], (tmp_path / "target", tmp_path / "drafter")
    reference = loader("reference")(*paths, LoadConfig(device="cpu", dtype="float32"))
    with SequenceSession(reference, drafts=True) as sequence:
        sequence.extend([1, 2, 3, 4, 5])
        features = np.concatenate(sequence.state.context)
    expected = gated_block(config, tensors, features, 6)
    pair = loader(backend)(*paths, LoadConfig(device="cpu", dtype="float32"))
    with SequenceSession(pair, drafts=True) as sequence:
        sequence.extend([1, 2, 3, 4, 5])
        actual = pair.drafter.log_probs(sequence.draft(6))
    np.testing.assert_allclose(actual, expected, atol=1e-5)
