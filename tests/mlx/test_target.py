import json
import os
import subprocess
import sys

import numpy as np
import pytest

from treeflash.config import LoadConfig, SamplingConfig
from treeflash.decoding.probe import check_trees
from treeflash.decoding.tree import DraftTree
from treeflash.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    UnsupportedModelError,
)
from treeflash.testing import require
from treeflash.testing.models import edit_config, write_drafter, write_target

require("mlx.core")
require("mlx_lm")

import mlx.core as mx  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from treeflash_mlx import backend as backend_module  # noqa: E402
from treeflash_mlx.backend import MlxBackend, load  # noqa: E402
from treeflash_mlx.config_compatibility import compatible_settings  # noqa: E402
from treeflash_mlx.target import Target  # noqa: E402
from treeflash_mlx.verifier import PREFILL_CHUNK  # noqa: E402

GREEDY = SamplingConfig()
VERIFIED = (
    "llama",
    "qwen2_moe",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "cohere2",
    "olmo3",
    "glm4",
    "phi3",
    "smollm3",
    "deepseek_v3",
)
THETA = 12345.0


def a_tree(*parents: int) -> DraftTree:
    """A tree of tokens 1, 2, ..."""
    depths = np.zeros(len(parents), np.int32)
    for node, parent in enumerate(parents[1:], 1):
        depths[node] = depths[parent] + 1
    tokens = np.arange(1, len(parents) + 1, dtype=np.int32)
    return DraftTree(tokens, np.array(parents, np.int32), depths, np.zeros(len(parents)))


@pytest.mark.parametrize("family", VERIFIED)
def test_family_branches_and_commits(families, tmp_path, rng, family):
    """Trees beyond every sliding window; commits, contiguous and not, against a fresh prefill."""
    assert families.attempt(family)[0] == "verified"
    families.write(tmp_path, family)
    backend = MlxBackend(Target(tmp_path, mx.float32, None), None, None)
    verifier = backend.verifier(features=False)
    tokens = rng.integers(0, 96, 20).tolist()
    verifier.prefill(tokens, GREEDY, None)
    for path in ([0, 4, 5], [0, 1, 2, 3], [0], [0, 1, 6]):
        tree = a_tree(-1, 0, 1, 2, 0, 4, 1)
        verifier.verify(tree, GREEDY, None)
        verifier.commit(np.array(path, np.int32))
        tokens += tree.tokens[path].tolist()
    fresh = backend.verifier(features=False)
    fresh.prefill(tokens, GREEDY, None)
    assert verifier.length == fresh.length == len(tokens)
    probe = a_tree(-1, 0, 0)
    np.testing.assert_allclose(verifier.logits(probe), fresh.logits(probe), atol=2e-4)


@pytest.mark.parametrize("family", ["qwen3_5", "mamba2", "granitemoehybrid", "gear", "gpt2"])
def test_family_that_cannot_branch_is_refused(families, tmp_path, family):
    families.write(tmp_path, family)
    with pytest.raises(UnsupportedModelError) as caught:
        check_trees(MlxBackend(Target(tmp_path, mx.float32, None), None, None))
    message = str(caught.value)
    assert "\n" not in message
    assert family in message or "--method ar still works" in message


def test_family_that_fails_the_probe_still_decodes_plainly(families, tmp_path):
    families.write(tmp_path, "gpt2")
    backend = load(tmp_path, None, LoadConfig())
    verifier = backend.verifier(features=False)
    root, _ = verifier.prefill([1, 2, 3], GREEDY, None)
    verifier.verify(DraftTree.root_only(root), GREEDY, None)
    verifier.commit(np.zeros(1, np.int32))
    assert verifier.length == 4


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "phi", "gpt_neox", "glm4"],
)
@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_theta"])
def test_rope_settings_arrive_in_either_spelling(families, tmp_path, family, old):
    """What transformers 5 saves, and what older files hold, give the same rotary base."""
    saved = AutoConfig.for_model(family)
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = {"rope_theta": THETA, "partial_rotary_factor": 0.5}
    config |= dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 64)
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    config |= {"head_dim": 16}
    config.pop("rope_parameters")
    if old:
        config |= {"rotary_emb_base": THETA, "rotary_pct": 0.5, **rope}
    else:
        config["rope_parameters"] = {"rope_type": "default", **rope}
    name = "llama" if family == "mistral" else family
    module = __import__(f"mlx_lm.models.{name}", fromlist=["Model"])
    model = module.Model(module.ModelArgs.from_dict({**config, **compatible_settings(config)}))
    bases = [m.base for _, m in model.named_modules() if isinstance(m, nn.RoPE)]
    assert bases == [THETA]


def test_rope_settings_by_layer_type():
    config = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    added = compatible_settings(config)
    assert added["rope_theta"] == 1e6
    assert added["rope_local_base_freq"] == 1e4
    assert added["rope_scaling"]["type"] == added["rope_scaling"]["rope_type"] == "linear"
    assert "rope_parameters" not in added


def test_what_a_file_says_is_not_changed():
    config = {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    assert not {"rope_theta", "rope_scaling", "rope_parameters"} & set(compatible_settings(config))
    inner = compatible_settings({"text_config": {"rope_theta": 5.0, "x": 1}})["text_config"]
    assert inner == {
        "rope_theta": 5.0,
        "x": 1,
        "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"},
    }


def test_hooks_leave_the_parameters_alone(pair):
    plain, _ = load_model(pair[0])
    hooked = load(*pair, LoadConfig()).target.model
    names = [[name for name, _ in tree_flatten(m.parameters())] for m in (plain, hooked)]
    assert names[0] == names[1]
    assert [name for name, _ in plain.named_modules()] == [n for n, _ in hooked.named_modules()]
    tokens = mx.array([[1, 2, 3, 4]])
    assert mx.array_equal(plain(tokens), hooked(tokens))


def test_two_models_at_once(families, tmp_path, pair):
    """Hooks sit on instances: another model of the same classes computes as before."""
    untouched, _ = load_model(pair[0])
    before = untouched(mx.array([[1, 2, 3]]))
    a, b = load(*pair, LoadConfig()), load(*pair, LoadConfig())
    verifiers = [backend.verifier(features=True) for backend in (a, b, a)]
    for verifier in verifiers:
        verifier.prefill([5, 6, 7], GREEDY, None)
    tree = a_tree(-1, 0, 0, 1)
    logits = [verifier.logits(tree) for verifier in verifiers]
    features = [v.commit(np.array([0, 1, 3], np.int32)) for v in verifiers]
    for other in (1, 2):
        np.testing.assert_array_equal(logits[0], logits[other])
        np.testing.assert_array_equal(np.array(features[0]), np.array(features[other]))
    assert mx.array_equal(untouched(mx.array([[1, 2, 3]])), before)
    assert "rotate" not in str(type(untouched.layers[0].self_attn.rope).__call__)


def test_features_are_the_projected_outputs_of_the_layers(pair):
    """In the order that the drafter asks for; without a drafter none are kept."""
    backend = load(*pair, LoadConfig())
    model = backend.target.model
    x = model.model.embed_tokens(mx.array([[3, 1, 4, 1]]))
    expected = []
    for i, layer in enumerate(load_model(pair[0])[0].layers):
        x = layer(x, "causal", None)
        if i in backend.drafter_config.target_layer_ids:
            expected.append(x[0])
    _, features = backend.verifier(features=True).prefill([3, 1, 4, 1], GREEDY, None)
    expected = backend.drafter_model.project(mx.concatenate(expected, axis=-1))
    assert mx.allclose(features, expected, atol=1e-4)
    silent = backend.verifier(features=False)
    assert silent.prefill([3, 1, 4, 1], GREEDY, None)[1] is None
    silent.verify(DraftTree.root_only(1), GREEDY, None)
    assert silent.commit(np.zeros(1, np.int32)) is None


def test_long_prefill_is_chunked(pair, rng):
    backend = load(*pair, LoadConfig())
    tokens = rng.integers(0, 64, 1100).tolist()
    whole, halves = backend.verifier(features=True), backend.verifier(features=True)
    chosen, features = whole.prefill(tokens, GREEDY, None)
    first = halves.prefill(tokens[:700], GREEDY, None)[1]
    again, second = halves.prefill(tokens[700:], GREEDY, None)
    assert chosen == again
    assert mx.allclose(features, mx.concatenate([first, second]), atol=1e-4)
    np.testing.assert_allclose(whole.keys_values(), halves.keys_values(), atol=1e-4)


def test_features_of_a_long_prompt_are_projected_by_chunks(pair, rng, monkeypatch):
    """Outputs of the target layers are never held for the whole prompt."""
    backend = load(*pair, LoadConfig())
    fc, call, projected = backend.drafter_model.fc, nn.Linear.__call__, []

    def record(self, x):
        if self is fc:
            projected.append(x.shape[0])
        return call(self, x)

    monkeypatch.setattr(nn.Linear, "__call__", record)
    verifier, drafter = backend.verifier(features=True), backend.drafter()
    root, features = verifier.prefill(rng.integers(0, 64, 1500).tolist(), GREEDY, None)
    assert sum(projected) == 1500
    assert max(projected) <= PREFILL_CHUNK
    assert features.shape == (1500, 128)
    drafter.extend(features[:1000])
    drafter.draft(features[1000:], root)
    assert sum(projected) == 1500


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_target(pair, tmp_path, bits):
    """A folder as `mlx_lm.convert -q` writes it."""
    model, config = load_model(pair[0])
    nn.quantize(model, 32, bits)
    config["quantization"] = {"group_size": 32, "bits": bits}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model.save_weights(str(tmp_path / "model.safetensors"))
    backend = load(tmp_path, pair[1], LoadConfig())
    assert isinstance(backend.target.lm_head, nn.QuantizedLinear)
    assert backend.target.embed(mx.array([1])).shape == (1, 128)


def test_quantised_keys_and_values(pair, rng):
    exact, rounded = load(*pair, LoadConfig()), load(*pair, LoadConfig(kv_bits=8))
    tokens = rng.integers(0, 64, 40).tolist()
    tree = a_tree(-1, 0, 0, 1, 2)
    caches = []
    for backend in (exact, rounded):
        verifier = backend.verifier(features=False)
        verifier.prefill(tokens, GREEDY, None)
        verifier.verify(tree, GREEDY, None)
        verifier.commit(np.array([0, 2, 4], np.int32))
        caches.append(verifier.keys_values())
    assert caches[0].shape == caches[1].shape
    assert 0 < np.abs(caches[0] - caches[1]).max() < 0.15
    assert rounded.verifier(features=False).cache[0].bits == 8


def test_kv_bits_that_cannot_be(families, pair, tmp_path):
    with pytest.raises(ConfigError, match="kv-bits must be one of"):
        load(*pair, LoadConfig(kv_bits=7))
    families.write(tmp_path / "narrow", "llama")
    with pytest.raises(ConfigError, match="multiple of 32"):
        load(tmp_path / "narrow", None, LoadConfig(kv_bits=8))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(pair, dtype):
    backend = load(*pair, LoadConfig(dtype=dtype))
    assert backend.dtype == dtype
    assert backend.drafter_model.fc.weight.dtype == getattr(mx, dtype)


def test_device_that_is_not_there(pair):
    if not mx.metal.is_available():
        with pytest.raises(BackendError, match="no GPU"):
            load(*pair, LoadConfig(device="gpu"))
    with pytest.raises(BackendError, match="gpu or cpu"):
        load(*pair, LoadConfig(device="cuda:0"))
    assert load(*pair, LoadConfig(device="cpu")).device == "cpu"


def test_model_type_that_mlx_lm_lacks(pair, tmp_path):
    write_target(tmp_path, "llama", seed=0)
    edit_config(tmp_path, lambda config: config.update(model_type="nothing"))
    with pytest.raises(UnsupportedModelError, match="'nothing'"):
        load(tmp_path, None, LoadConfig())


def test_scaling_by_column_is_refused_for_drafting_only(families, tmp_path, pair):
    families.write(tmp_path / "target", "ministral3")
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=0)
    load(tmp_path / "target", None, LoadConfig())
    with pytest.raises(UnsupportedModelError, match="by column"):
        load(tmp_path / "target", tmp_path / "drafter", LoadConfig())


@pytest.mark.parametrize("which", [0, 1], ids=["target", "drafter"])
def test_damaged_file(pair, tmp_path, which):
    folders = []
    for i, source in enumerate(pair):
        folder = tmp_path / str(i)
        folder.mkdir()
        for file in source.iterdir():
            data = file.read_bytes()
            cut = i == which and file.suffix == ".safetensors"
            (folder / file.name).write_bytes(data[: len(data) // 2] if cut else data)
        folders.append(folder)
    with pytest.raises(CheckpointError) as caught:
        load(*folders, LoadConfig())
    assert str(folders[which]) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_shortlist_logits_are_those_of_the_whole_vocabulary(families, tmp_path, rng, family):
    """With the bias that some output heads have."""
    families.write(tmp_path, family)
    target = Target(tmp_path, mx.float32, None)
    assert ("bias" in target.lm_head) == (family == "phi")
    hidden = mx.array(rng.normal(size=(3, 64)), mx.float32)
    tokens = mx.array([5, 0, 90])
    expected = target.output_head(hidden)[:, tokens]
    assert mx.allclose(target.shortlist_logits(hidden, tokens), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_experts_in_half_precision_on_a_cpu_are_one_clear_line(families, tmp_path, dtype):
    families.write(tmp_path, "qwen3_moe")
    with pytest.raises(ConfigError, match=r"in float32 only; pass --dtype float32") as caught:
        load(tmp_path, None, LoadConfig(device="cpu", dtype=dtype))
    assert "\n" not in str(caught.value)
    assert load(tmp_path, None, LoadConfig(device="cpu", dtype="float32")).dtype == "float32"


@pytest.mark.parametrize("late", [False, True])
def test_tf32_that_cannot_be_turned_off_any_more_is_said(monkeypatch, recwarn, late):
    monkeypatch.setattr(backend_module, "TF32_MAY_BE_ON", late)
    backend_module.warn_of_tf32()
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == late
    assert all("MLX_ENABLE_TF32=0" in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("before", "set_by_user", "late"),
    [("", False, False), ("import mlx.core, ", False, True), ("import mlx.core, ", True, False)],
)
def test_whether_tf32_may_be_on(before, set_by_user, late):
    """MLX reads the variable once, perhaps before the backend is imported."""
    program = f"{before or 'import '}treeflash_mlx; print(treeflash_mlx.TF32_MAY_BE_ON)"
    env = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    if set_by_user:
        env["MLX_ENABLE_TF32"] = "0"
    run = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(late)
