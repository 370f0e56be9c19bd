"""Drafters on MLX against the reference, quantised or not."""

import json

import numpy as np
import pytest
from byte_tokens import save_tokenizer
from families import LAYERS
from mtp_pairs import write_mtp_pair
from recordings import recording
from safetensors.numpy import save_file

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding.session import SequenceSession
from treeflash.drafters.folder import read_config
from treeflash.drafters.mtp_heads import MtpExperts
from treeflash.drafters.mtp_layer import Router
from treeflash.language_model import load as load_model
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import edit_config, write_dialect, write_pair

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from mlx import nn
from treeflash_mlx import backend as backend_module
from treeflash_mlx.backend import load
from treeflash_mlx.drafter_loading import choose_bits, fill
from treeflash_mlx.drafter_model import as_module

pytestmark = pytest.mark.sample(1)

GREEDY = SamplingConfig()
SEEDED = SamplingConfig(temperature=0.8, top_p=0.9, seed=5)


def drafted(backend, tokens, root, depths=None):
    """A sequence whose drafter was given its tokens in two parts, and the block after them."""
    sequence = SequenceSession(backend, drafts=True)
    sequence.extend(tokens[:7])
    sequence.draft(tokens[7])
    sequence.extend(tokens[7:])
    (block,) = backend.drafter.draft([(sequence.state, root)], depths)
    return sequence, block


@pytest.mark.parametrize(("window", "seen"), [(None, 4096), (100, 100)])
def test_a_block_drafter_sees_the_last_positions_by_default(tmp_path, window, seen):
    target, drafter = write_pair(tmp_path, "qwen3")
    assert load(target, drafter, LoadConfig(draft_window=window)).drafter.window == seen


@pytest.mark.parametrize(("dialect", "causal"), [("deepspec-sinks", True), ("dflash", False)])
def test_slots_that_nothing_sees_are_not_computed(tmp_path, dialect, causal):
    """Only if none sees later ones: then outputs of fewer depths are the first of all."""
    target, _ = write_pair(tmp_path, "qwen3")
    write_dialect(tmp_path / "dialect", target, dialect, seed=2)
    backend = load(target, tmp_path / "dialect", LoadConfig())
    config = backend.drafter_config
    assert all(config.causal) == causal
    blocks, rows = [], []
    for depths in (None, 2, config.depths + 1):
        with recording(backend.drafter.output, "embed") as embedded:
            blocks.append(drafted(backend, [*range(1, 12)], 5, depths)[1])
        rows.append(embedded[-1][0].size)
    least = config.first_slot + 2 if causal else config.block_size
    assert rows == [config.block_size, least, config.block_size]
    whole, few, _ = (np.array(block.hidden) for block in blocks)
    assert len(few) == 2
    np.testing.assert_allclose(few, whole[:2], atol=1e-5)


def test_convolutions_along_causal_blocks_see_the_slots_of_their_own_block_alone(tmp_path):
    """With fewer rows a block is shorter, and two sequences have as many rows as one long block."""
    target, _ = write_pair(tmp_path, "qwen3")
    write_dialect(tmp_path / "dialect", target, "dflash2", seed=2)
    edit_config(tmp_path / "dialect", lambda config: config.update(is_causal=True))
    backend = load(target, tmp_path / "dialect", LoadConfig())
    assert all(backend.drafter_config.causal)
    _, whole = drafted(backend, [*range(1, 12)], 5)
    roots = [(drafted(backend, [*range(1, 12)], 5)[0].state, 5) for _ in range(2)]
    for block in backend.drafter.draft(roots, 2):
        np.testing.assert_allclose(block.hidden, whole.hidden[:2], atol=1e-5)


def write_side_file(target, folder):
    """Write the MTP head of a target as mlx-vlm does: most layers in groups of 4 bits, one of 8."""
    settings = {"group_size": 32, "bits": 4, "mode": "affine"}
    wide = "layers.0.mlp.up_proj"
    config = read_config(target)["text_config"] | {"model_type": "qwen3_5_mtp"}
    tensors = {}
    for stored, tensor in mx.load(str(target / "mtp.safetensors")).items():
        name = stored.removeprefix("mtp.")
        if tensor.ndim == 1:
            tensors[name] = tensor + 1
        elif tensor.shape[-1] % 32 == 0:
            base = name.removesuffix("weight")
            parts = mx.quantize(tensor, 32, 8 if name.startswith(wide) else 4)
            tensors |= dict(zip((name, f"{base}scales", f"{base}biases"), parts, strict=True))
        else:
            tensors[name] = tensor
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization": settings | {wide: settings | {"bits": 8}}})
    )
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def test_quantised_layers_of_a_side_file_stay_as_they_are(tmp_path):
    """With at most the wanted bits; a layer that has more is quantised anew, or not at all."""
    target, _ = write_mtp_pair(tmp_path, "mtp")
    write_side_file(target, tmp_path / "side")
    rows, layers = {}, {}
    for bits in (16, 8, 4):
        backend = load(target, tmp_path / "side", LoadConfig(draft_bits=bits))
        mlp = backend.drafter_model.layer.mlp
        layers[bits] = [getattr(x, "bits", 0) for x in (mlp.gate_proj, mlp.up_proj)]
        block = drafted(backend, list(range(12)), 3)[1]
        rows[bits] = backend.head.log_probs(block, np.array([3, 5, 7], np.int32))
    assert layers == {16: [0, 0], 8: [4, 8], 4: [4, 0]}
    assert mlp.gate_proj.group_size == 32
    np.testing.assert_allclose(rows[8], rows[16], atol=1e-4)
    np.testing.assert_allclose(rows[4], rows[16], atol=1e-4)


def test_a_quantised_router_of_a_side_file_is_dequantised():
    """It is no layer of MLX, which could stay quantised."""
    sizes = {"count": 4, "per_token": 2, "width": 8, "shared_width": 8}
    experts = MtpExperts(**sizes, shared_gate=True, sigmoid=False, normalised=True)
    module, weight = nn.Module(), mx.random.normal((4, 32))
    module.gate = as_module(Router)(experts, 32)
    packed = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, 32, 8), strict=True))
    fill(module, {"gate.weight": weight}, mx.float32, 8, {"gate": packed})
    np.testing.assert_array_equal(module.gate.weight, weight)


@pytest.mark.parametrize(("bits", "expected"), [(2, 4), (4, 4), (8, 8), (None, None)])
def test_a_drafter_has_the_bits_of_most_of_the_targets_weights(bits, expected):
    layers = nn.Linear(64, 320), nn.Linear(64, 64)
    if bits is not None:
        layers = nn.QuantizedLinear.from_linear(layers[0], 64, bits), layers[1]
    target = nn.Sequential(*layers, nn.RMSNorm(64))
    assert choose_bits(None, target, on_cpu=False) == expected
    assert choose_bits(None, target, on_cpu=True) is None
    assert choose_bits(3, target, on_cpu=True) == 3
    assert choose_bits(16, target, on_cpu=False) is None


def test_a_drafter_is_quantised_like_its_target(quantised_pair, monkeypatch):
    """Its default is not a setting of the target: the texts stay the same."""
    monkeypatch.setattr(
        backend_module, "choose_bits", lambda *args, on_cpu: choose_bits(*args, on_cpu=False)
    )
    kinds, texts = [], []
    for bits in (None, 16):
        backend = load(*quantised_pair, LoadConfig(draft_bits=bits))
        kinds.append(type(backend.drafter_model.layers[0].mlp.up_proj))
        config = DecodeConfig(max_tokens=20, budget=16)
        texts.append(generate(backend, [1, 2, 3], config))
    assert kinds == [nn.QuantizedLinear, nn.Linear]
    assert texts[0] == texts[1]


def test_an_incomplete_head_of_glm_4_7_flash_is_passed_over(families, tmp_path, caplog):
    families.write(tmp_path, "glm4_moe_lite", vocab_size=300)
    save_tokenizer(tmp_path)
    head = {f"model.layers.{LAYERS}.eh_proj.weight": np.zeros((2, 2), np.float32)}
    save_file(head, tmp_path / "mtp.safetensors")
    model = load_model(tmp_path, device="cpu", backend="mlx", dtype="float32")
    line = caplog.messages[0]
    assert f"the MTP head in {tmp_path} is skipped: {tmp_path} lacks the tensor" in line
    plain = load_model(tmp_path, False, device="cpu", backend="mlx", dtype="float32")
    text = model.generate("hi", max_tokens=16)
    assert text.method == "suffix"
    assert text.token_ids == plain.generate("hi", max_tokens=16, method="ar").token_ids


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_gpu_begins_a_draft_before_its_table_is_built(pair, see_device, monkeypatch, on_gpu):
    """A CPU would compute while it should build the rest."""
    backend = load(*pair, LoadConfig())
    with SequenceSession(backend, drafts=True) as sequence:
        root = sequence.extend([5, 6, 7])
        expected = np.array(sequence.draft(root).hidden)
    submitted = []
    with SequenceSession(backend, drafts=True) as sequence:
        sequence.extend([5, 6, 7])
        see_device(mx.gpu if on_gpu else mx.cpu)
        monkeypatch.setattr(mx, "async_eval", submitted.append)
        block = sequence.draft(root)
    layers = backend.drafter_config.num_hidden_layers
    assert len(submitted) == (len({0, layers - 1}) if on_gpu else 0)
    np.testing.assert_array_equal(np.array(block.hidden), expected)
