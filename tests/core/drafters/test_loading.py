"""Model folders and the drafters in them: whole tensors, and each error by its message."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mtp_pairs import write_mtp_pair
from safetensors.numpy import save_file

from treeflash.config import LoadConfig
from treeflash.drafters import mtp_heads
from treeflash.drafters.evaluation import EVALUATION, DrafterEvaluation, read_evaluation
from treeflash.drafters.folder import (
    open_folder,
    read_config,
    read_file,
    read_quantised,
    read_tensors,
    stored_shapes,
    weight_files,
)
from treeflash.drafters.formats import canonical_name, drafter_shapes, head_inner_size
from treeflash.drafters.loading import (
    check_drafter,
    check_pair,
    check_shapes,
    drafter_config,
    load_tensors,
    read_layout,
    refuse_extensions,
)
from treeflash.drafters.mtp_formats import ASSISTANT, EAGLE3, GLM_MTP, QWEN_MTP, QWEN_SIDECAR
from treeflash.drafters.mtp_tensors import mtp_shapes, split_fused, stack_experts
from treeflash.errors import CheckpointError, ConfigError, UnsupportedModelError
from treeflash.hub.models import resolve_drafter
from treeflash.testing.models import save, write_dialect, write_target


def message(text: str) -> str:
    """A pattern that matches the whole message and nothing else."""
    return f"^{re.escape(text)}$"


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        *((x, " cannot be read as JSON: ") for x in (b"{", b"", b"\xff\xfe{}", DEEP, b"9" * 5000)),
        *((x, " does not hold a JSON object") for x in (b"[]", b"3", b"null")),
    ],
)
def test_a_config_that_is_none(tmp_path, content, problem):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json{problem}"):
        read_config(tmp_path)


def test_no_config(tmp_path):
    expected = f"{tmp_path} has no config.json; it is not a model folder"
    with pytest.raises(CheckpointError, match=message(expected)):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON: "):
        read_config(tmp_path)


class TestReading:
    VALUES = np.array([[0, 1, -2.5], [3.140625, -0.00390625, 65280]], np.float32)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_float(self, tmp_path, dtype):
        values = np.clip(self.VALUES, -1000, 1000).astype(dtype)
        save_file({"a": values, "b": values[0].copy()}, tmp_path / "x.safetensors")
        tensors = read_tensors(tmp_path)
        assert tensors["a"].dtype == np.float32
        np.testing.assert_array_equal(tensors["a"], values)
        np.testing.assert_array_equal(tensors["b"], values[0])

    def test_bfloat16(self, tmp_path):
        """Written by hand, since NumPy has no such type: the upper half of each float32."""
        upper = (self.VALUES.view(np.uint32) >> 16).astype("<u2")
        write_raw(tmp_path / "x.safetensors", "BF16", self.VALUES.shape, upper.tobytes())
        tensor = read_tensors(tmp_path)["a"]
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, self.VALUES)

    def test_bfloat16_specials(self, tmp_path):
        bits = np.array([0x7F80, 0xFF80, 0x7FC0, 0x8000, 0x0001], "<u2")
        write_raw(tmp_path / "x.safetensors", "BF16", (5,), bits.tobytes())
        tensor = read_tensors(tmp_path)["a"]
        assert tensor[:2].tolist() == [np.inf, -np.inf]
        assert np.isnan(tensor[2])
        assert np.signbit(tensor[3])
        assert tensor[4] == np.float32(2.0**-133)

    def test_other_types_are_refused(self, tmp_path):
        path = tmp_path / "x.safetensors"
        save_file({"a": np.zeros(3, np.int32)}, path)
        expected = f"{path} holds tensors of type I32; supported are BF16, F16, F32, F64"
        for read in (read_tensors, stored_shapes):
            with pytest.raises(CheckpointError, match=message(expected)):
                read(tmp_path)

    @pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:4], bytes.lower])
    def test_damaged_file(self, folder, damage):
        path = folder / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))} is damaged: "):
            read_tensors(folder)
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))} is damaged: "):
            stored_shapes(folder)

    def test_other_formats_are_not_read(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        expected = f"{tmp_path} has no *.safetensors file; convert its weights"
        with pytest.raises(CheckpointError, match=message(expected)):
            weight_files(tmp_path)


def write_raw(path: Path, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    """A safetensors file with one tensor, `a`."""
    entry = {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": [0, len(data)]}}
    header = json.dumps(entry).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weights_that_mlx_has_quantised(bits, tmp_path):
    """A layer may have its own settings, and experts may be stacked."""
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(bits)
    saved, expected = {"plain.weight": mx.zeros((2, 3))}, {}
    for name, shape, group in (("a", (6, 64), 32), ("b", (3, 5, 128), 64)):
        packed = mx.quantize(mx.array(rng.normal(size=shape).astype(np.float32)), group, bits)
        expected[f"{name}.weight"] = np.array(mx.dequantize(*packed, group, bits))
        saved |= dict(
            zip((f"{name}.{x}" for x in ("weight", "scales", "biases")), packed, strict=True)
        )
    mx.save_safetensors(str(tmp_path / "model.safetensors"), saved)
    settings = {"group_size": 32, "bits": bits, "b": {"group_size": 64, "bits": bits}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": settings}))
    folder = open_folder(tmp_path)
    assert folder.tensors.keys() == {"plain.weight", *expected}
    for name, values in expected.items():
        tensor = folder.tensors[name]
        assert (tensor.shape, tensor.bits) == (values.shape, bits)
        (found,) = read_quantised(tensor.path, {name: tensor}).values()
        np.testing.assert_allclose(found, values, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "words", "scales", "biases"),
    [
        ("mxfp4", 8, np.zeros((4, 2), np.uint8), np.zeros((4, 2), np.uint8)),
        ("affine", 8, np.zeros((4, 8), "f4"), np.zeros((4, 8), "f4")),
        ("affine", 7, np.zeros((4, 2), "f4"), np.zeros((4, 2), "f4")),
        ("affine", 8, np.zeros((4, 2), np.int8), np.zeros((4, 2), np.int8)),
        ("affine", 8, np.zeros((4, 2), "f4"), np.zeros((3, 2), "f4")),
        ("affine", 8, np.zeros((4, 2), "f4"), np.zeros((4, 1), "f4")),
        ("affine", 8, np.zeros((4, 0), "f4"), np.zeros((4, 0), "f4")),
        ("affine", 8, np.zeros(8, "f4"), np.zeros(8, "f4")),
    ],
)
def test_other_quantisations_of_mlx_stay_what_they_are(mode, words, scales, biases, tmp_path):
    """A mode of another kind, groups that would have one bit for a number, and damaged files."""
    words = {"a.weight": np.zeros((4, words), np.uint32), "a.scales": scales, "a.biases": biases}
    save_file(words, tmp_path / "model.safetensors")
    settings = {"group_size": 32, "bits": 4, "mode": mode}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": settings}))
    folder = open_folder(tmp_path)
    assert folder.tensors["a.weight"].bits == 0
    assert folder.tensors.keys() == words.keys()


TARGET_SHAPE = {"hidden_size": 32, "vocab_size": 24, "num_hidden_layers": 4}


class TestPairs:
    def test_what_a_drafter_does_not_state_is_not_checked(self, folder):
        config = replace(drafter_config(folder), vocab_size=None, num_target_layers=None)
        check_pair(config, hidden_size=32, vocab_size=50, num_hidden_layers=9)

    def test_a_target_with_sizes_of_other_names_is_not_checked(self, folder):
        assert check_drafter(folder, TARGET_SHAPE) == drafter_config(folder)
        assert check_drafter(folder, {"n_embd": 32, "vocab_size": 24, "n_layer": 4}) is None

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"hidden_size": 64}, "its hidden size is 64, the target's is 32"),
            ({"vocab_size": 25}, "its vocabulary has 25 tokens, the target's has 24"),
            ({"mask_token_id": 24}, "its mask token 24 is outside the vocabulary of 24"),
            ({"mask_token_id": -1}, "its mask token -1 is outside the vocabulary of 24"),
            ({"num_target_layers": 5}, "it was trained for a target of 5 layers, this one has 4"),
            ({"target_layer_ids": (0, 4)}, "it reads target layers [0, 4], the target has 4"),
            ({"target_layer_ids": (-2, 2)}, "it reads target layers [-2, 2], the target has 4"),
        ],
        ids=str,
    )
    def test_a_pair_that_does_not_fit(self, folder, change, problem):
        config = replace(drafter_config(folder), **change)
        expected = message(f"drafter and target do not fit: {problem}")
        with pytest.raises(CheckpointError, match=expected):
            check_pair(config, **TARGET_SHAPE)


class TestTensors:
    @pytest.mark.parametrize("missing", ["ug.bias", "d.weight"])
    def test_either_tensor_gives_the_width_of_a_head(self, folder, missing):
        shapes = drafter_shapes(drafter_config(folder), head_size=5)
        del shapes[f"ar_approximation.{missing}"]
        assert head_inner_size(shapes) == 5

    def test_every_missing_tensor_and_an_unexpected_one_are_named(self, folder):
        config = drafter_config(folder)
        shapes = {canonical_name(name): x.shape for name, x in read_tensors(folder).items()}
        check_shapes(folder, config, shapes)
        for name, shape in shapes.items():
            rest = {other: shapes[other] for other in shapes if other != name}
            expected = f"{folder} lacks the tensor {name} of shape {shape}"
            with pytest.raises(CheckpointError, match=message(expected)):
                check_shapes(folder, config, rest)
        more = "layers.2.mlp.up_proj.weight"
        expected = f"{folder} holds an unexpected tensor for its configuration: {more}"
        with pytest.raises(CheckpointError, match=message(expected)):
            check_shapes(folder, config, shapes | {more: (64, 32), "z": (1,)})

    def test_quantised_weights_are_refused_before_they_are_read(self, folder):
        tensors = read_tensors(folder)
        tensors["model.fc.weight"] = tensors["model.fc.weight"].astype(np.int8)
        save(folder, read_config(folder), tensors)
        with pytest.raises(CheckpointError, match="holds tensors of type I8; supported are"):
            load_tensors(folder, pytest.fail, **TARGET_SHAPE)
        tensors["model.fc.weight"] = np.zeros((32, 4), np.uint32)
        tensors |= {f"model.fc.{part}": np.zeros((32, 1), "f4") for part in ("scales", "biases")}
        mode = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        for quantisation in (mode, mode | {"mode": "affine", "model.fc": mode}):
            save(folder, read_config(folder) | {"quantization": quantisation}, tensors)
            with pytest.raises(CheckpointError, match="mode 'mxfp4'; the mode 'affine' is"):
                load_tensors(folder, pytest.fail, **TARGET_SHAPE)


@pytest.mark.parametrize(("difference", "named"), [(23, "0 to 24"), (-2, "-1 to ")])
@pytest.mark.parametrize("is_block", [True, False])
def test_tokens_that_the_target_lacks_are_refused(is_block, difference, named, tmp_path):
    """A drafter's own vocabulary has differences; some files have the ids themselves."""
    if is_block:
        target, head = tmp_path / "target", tmp_path / "head"
        write_target(target, "llama", seed=1)
        write_dialect(head, target, "speculators-dflash", seed=2)
    else:
        target, head = write_mtp_pair(tmp_path, "eagle3", draft_vocab_size=16)
    shape = {name: read_config(target)[name] for name in TARGET_SHAPE}
    tensors = read_tensors(head)
    layout = read_layout(head, **shape)
    layout.read(read_file, read_quantised, np.stack)
    tensors["d2t"][:2] = 0, difference
    save(head, read_config(head), tensors)
    with pytest.raises(CheckpointError, match=f"d2t names tokens from {named}.* has 24 tokens"):
        layout.read(read_file, read_quantised, np.stack)


def test_a_backend_for_block_drafters_refuses_a_head_that_drafts_depth_by_depth(tmp_path):
    target, head = write_mtp_pair(tmp_path, "eagle3")
    shape = {name: read_config(target)[name] for name in TARGET_SHAPE}
    with pytest.raises(UnsupportedModelError, match="has the head 'eagle3', which drafts depth"):
        load_tensors(head, read_file, **shape)
    config = read_layout(head, **shape).config
    with pytest.raises(UnsupportedModelError, match="a test does not support"):
        refuse_extensions(config, "a test")


def published(name):
    """Read the configuration of a dialect."""
    path = Path(__file__).parent / "formats" / name / "config.json"
    return json.loads(path.read_text("utf-8"))


EAGLE, QWEN = published("eagle3"), published("qwen-mtp")
QWEN_MOE = QWEN | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
QWEN_MOE |= {"shared_expert_intermediate_size": 6}
SHARED = ("embed_tokens.weight", "lm_head.weight")
"""Tensors that a head may share with its target."""


def write_eagle(folder, **changes):
    """Write a head without what it shares; returns its configuration and its tensors."""
    config = {**EAGLE, **changes}
    shapes = mtp_shapes(EAGLE3.parse(config, (), 12), 10)
    stored = {x: np.zeros(shape, "f4") for x, shape in shapes.items() if x not in SHARED}
    save(folder, config, stored)
    return config, stored


def load(folder, **changes):
    """Return the configuration, weights and vocabulary of a head."""
    target = {"hidden_size": 8, "vocab_size": 10, "num_hidden_layers": 12, **changes}
    layout = read_layout(folder, **target)
    tensors = layout.read(read_file, read_quantised, np.stack)
    return layout.config, tensors.backbone, tensors.vocabulary


class TestHeads:
    """Heads that draft depth by depth."""

    def test_a_head_fits_its_target(self, tmp_path):
        write_eagle(tmp_path / "head")
        config, weights, vocabulary = load(tmp_path / "head")
        assert not vocabulary
        assert weights.keys() == mtp_shapes(config, 10).keys() - {*SHARED}
        for changes, problem in (
            ({"hidden_size": 16}, "its hidden size is 8, the target's is 16"),
            ({"vocab_size": 11}, "its vocabulary has 10 tokens, the target's has 11"),
            ({"num_hidden_layers": 2}, r"it reads target layers \[1, 0, -2\], the target has 2"),
        ):
            with pytest.raises(CheckpointError, match=problem):
                load(tmp_path / "head", **changes)
        write_eagle(tmp_path / "embeddings", eagle_aux_hidden_state_layer_ids=[0, 5, 9])
        assert load(tmp_path / "embeddings")[0].target_layer_ids == (-1, 4, 8)
        names = ("mtp.fc.weight", "mtp.pre_fc_norm_hidden.weight")
        save(tmp_path / "mtp", QWEN, {name: np.zeros(1, "f4") for name in names})
        with pytest.raises(CheckpointError, match="a target of 12 layers, this one has 11"):
            load(tmp_path / "mtp", num_hidden_layers=11)

    @pytest.mark.parametrize(
        ("settings", "tensors", "problem"),
        [
            ({}, {"norm.weight": None}, "lacks the tensor norm.weight of shape (8,)"),
            (
                {},
                {"fc.weight": np.zeros((2, 2), "f4")},
                "tensor fc.weight has shape (2, 2), config.json asks for (8, 24)",
            ),
            ({}, {"extra": np.zeros(2, "f4")}, "an unexpected tensor for an MTP or EAGLE-3 head:"),
            ({}, {"fc.weight": np.zeros((8, 24), np.int8)}, "tensors of type I8"),
            ({"vocab_size": None}, {}, "config.json lacks 'vocab_size'"),
            ({"hidden_size": "wide"}, {}, "config.json is not valid: "),
            ({"draft_vocab_size": 7}, {}, "lacks the tensor lm_head.weight"),
        ],
    )
    def test_a_head_that_is_not_whole(self, tmp_path, settings, tensors, problem):
        config, stored = write_eagle(tmp_path)
        config, stored = config | settings, stored | tensors
        save(
            tmp_path,
            {name: x for name, x in config.items() if x is not None},
            {name: x for name, x in stored.items() if x is not None},
        )
        with pytest.raises(CheckpointError, match=re.escape(problem)):
            load(tmp_path)

    def test_a_head_of_another_quantisation(self, tmp_path):
        packed = {"quantization": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}
        words = {"fc.weight": np.zeros((8, 2), np.uint32)}
        words |= {"pre_fc_norm_hidden.weight": np.zeros(1, "f4")}
        save(tmp_path, {**QWEN, **packed, "model_type": "qwen3_5_mtp"}, words)
        with pytest.raises(CheckpointError, match="mode 'nvfp4'; the mode 'affine' is supported"):
            load(tmp_path)

    def test_a_head_with_a_vocabulary_of_its_own(self, tmp_path):
        config, stored = write_eagle(tmp_path, draft_vocab_size=7)
        own = {"lm_head.weight": np.ones((7, 8), "f4"), "d2t": np.zeros(7, np.int64)}
        save(tmp_path, config, stored | own)
        assert load(tmp_path)[2].keys() == own.keys()

    @pytest.mark.parametrize("fused", [False, True])
    def test_experts_are_stacked(self, tmp_path, fused):
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
        _, weights, _ = load(tmp_path / "head")
        for name, expected in zip(parts, (gate, up, down), strict=True):
            np.testing.assert_array_equal(weights[f"layer.mlp.experts.{name}"], expected)
        assert not [name for name in weights if name.startswith("layer.mlp.experts.0")]

    def test_stacked_experts_of_mlx(self):
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

    def test_what_only_some_backends_and_drafters_have(self):
        assistant = ASSISTANT.parse(published("gemma4-assistant"), (), 12)
        latent = GLM_MTP.parse(published("glm-mtp-latent"), (), 12)
        mtp_heads.refuse_window(LoadConfig())
        with pytest.raises(ConfigError, match="draft_window is not supported"):
            mtp_heads.refuse_window(LoadConfig(draft_window=8))
        mtp_heads.refuse_missing_targets(QWEN_MTP.parse(QWEN, (), 12), "reference")
        for config, backend, problem in (
            (assistant, "reference", "by the reference backend; use the mlx"),
            (latent, "cuda", "latent attention is not supported by the cuda"),
        ):
            with pytest.raises(UnsupportedModelError, match=problem):
                mtp_heads.refuse_missing_targets(config, backend)


RECORD = {"max_length": 512, "top1_marginal": [0.5, 0.25], "kl_marginal": [1.5, 2.0]}


class TestEvaluation:
    """The evaluation in a drafter's folder, which may hold anything."""

    @pytest.mark.parametrize(
        ("record", "by_depth"),
        [(RECORD, (0.5, 0.25)), ({**RECORD, "top1_corrected": [0.75, 0.5]}, (0.75, 0.5))],
        ids=["drafter", "head"],
    )
    def test_with_a_head_its_shares_count(self, tmp_path, record, by_depth):
        (tmp_path / EVALUATION).write_text(json.dumps(record))
        assert read_evaluation(tmp_path) == DrafterEvaluation(by_depth=by_depth, max_length=512)

    def test_the_bundled_drafter_has_one(self):
        assert read_evaluation(resolve_drafter(None, None)).by_depth[0] == 0.730

    @pytest.mark.parametrize(
        "contents",
        [
            *(b"", b"\xff", b"[]", b"7", b"[" * 100_000, b'{"accuracy": 0.9}'),
            b'{"max_length": 512, "top1_marginal": []}',
            b'{"max_length": 512, "top1_marginal": 0.5}',
            b'{"max_length": 512, "top1_marginal": ["a"]}',
            b'{"max_length": 512, "top1_marginal": [NaN]}',
            b'{"max_length": 512, "top1_marginal": [73]}',
            b'{"max_length": null, "top1_marginal": [0.5]}',
            b'{"max_length": Infinity, "top1_marginal": [0.5]}',
        ],
    )
    def test_another_file_of_this_name_is_none(self, tmp_path, contents):
        assert read_evaluation(tmp_path) is None
        (tmp_path / EVALUATION).write_bytes(contents)
        assert read_evaluation(tmp_path) is None
