"""Block drafters of the dialects: their tensors, what backends refuse, and what they compute."""

import re
from dataclasses import replace

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.drafters.backbone import default_target_layer_ids
from treeflash.drafters.folder import read_config, read_file, read_tensors
from treeflash.drafters.formats import unknown_keys
from treeflash.drafters.loading import drafter_config, load_tensors, refuse_extensions
from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash.registry import loader
from treeflash.testing import models
from treeflash.testing.comparisons import generate
from treeflash.testing.models import DIALECTS, save, write_dialect, write_target

TARGET = {"hidden_size": 32, "vocab_size": 24, "num_hidden_layers": 4}
PACKAGES = {"reference": "numpy", "cuda": "torch", "mlx": "mlx_lm"}
each_backend = pytest.mark.parametrize("backend", PACKAGES)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a small target, and drafters of several dialects."""
    root = tmp_path_factory.mktemp("dialects")
    write_target(root / "target", "qwen3", seed=0)
    for dialect in DIALECTS:
        write_dialect(root / dialect, root / "target", dialect, seed=1)
    return root


@pytest.fixture
def edited(root, tmp_path):
    """Write a drafter that is another one changed; returns its folder."""

    def edited(dialect, change=lambda tensors: None, **settings):
        config, tensors = read_config(root / dialect), read_tensors(root / dialect)
        change(tensors)
        save(tmp_path / "edited", config | settings, tensors)
        return tmp_path / "edited"

    return edited


def load_pair(root, drafter, backend, **settings):
    """Load a drafter of a folder, or in another one, with its target."""
    pytest.importorskip(PACKAGES[backend])
    options = LoadConfig(device="cpu", dtype="float32", **settings)
    return loader(backend)(root / "target", root / drafter, options)


def scores(pair):
    """The log probabilities of the marginals, and of the head if there is one."""
    with SequenceSession(pair, drafts=True) as sequence:
        sequence.extend([1, 2, 3, 4, 5])
        block = sequence.draft(6)
        previous = np.full(pair.drafter_config.depths, 7, np.int32)
        head = [] if pair.head is None else [pair.head.log_probs(block, previous)]
        return [pair.drafter.log_probs(block), *head]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_dialect_passes_for_dflash(root, dialect):
    with pytest.raises(UnsupportedModelError, match=r"^a test does not support a drafter with \w"):
        refuse_extensions(drafter_config(root / dialect), "a test")


def test_a_backend_names_what_it_has_beyond_dflash(root):
    config = drafter_config(root / "deepspec")
    own = {"heads": ("vanilla",), "supported": ("first_slot", "own_vocabulary")}
    with pytest.raises(UnsupportedModelError, match="with features of the embeddings"):
        refuse_extensions(config, "a test", **own)
    own["supported"] += ("target_layer_ids",)
    refuse_extensions(config, "a test", **own)
    with pytest.raises(UnsupportedModelError, match="with a factor on its embeddings"):
        refuse_extensions(replace(config, input_scale=2.0), "a test", **own)


def test_copies_of_the_target_may_be_left_out(root, edited):
    copies = {"embed_tokens.weight", "lm_head.weight"}
    loaded = load_tensors(root / "deepspec-dflash", read_file, **TARGET)
    assert loaded.vocabulary.keys() == copies
    folder = edited("deepspec-dflash", lambda tensors: [tensors.pop(name) for name in copies])
    loaded = load_tensors(folder, read_file, **TARGET)
    assert loaded.vocabulary == {}
    assert loaded.config.first_slot == 0  # though it looks like z-lab's DFlash


@pytest.mark.parametrize("name", ["d2t", "lm_head.weight", "markov_head.markov_w1.weight"])
def test_a_missing_tensor_is_named(edited, name):
    folder = edited("speculators-dspark", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks the tensor {name} of shape"):
        load_tensors(folder, read_file, **TARGET)


@pytest.mark.parametrize("rank", [-1, 10**18])
def test_a_size_that_no_tensor_has_is_a_misfit(edited, rank):
    with pytest.raises(CheckpointError, match=rf"markov_w1\.weight has shape .*, {rank}\)"):
        load_tensors(edited("deepspec", markov_rank=rank), read_file, **TARGET)


def test_a_mask_embedding_is_refused(edited):
    folder = edited("dflash2")
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


@each_backend
def test_interleaved_rotary_embeddings_of_lfm2(backend, root, edited):
    """The same drafter with the channels of its heads in the other order drafts the same."""
    half = read_config(root / "deepspec")["head_dim"] // 2

    def interleave(tensors):
        for name, tensor in tensors.items():
            if re.search(r"\.[qk]_(proj|norm)\.", name):
                halves = tensor.reshape(-1, 2, half, *tensor.shape[1:])
                tensors[name] = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))

    settings = {"architectures": ["Lfm2DSparkDraftModel"], "rope_is_neox_style": False}
    folder = edited("deepspec", interleave, **settings)
    halves, pairs = (scores(load_pair(root, x, backend))[0] for x in ("deepspec", folder))
    np.testing.assert_allclose(halves, pairs, atol=1e-5)


@each_backend
def test_a_mask_beyond_the_targets_vocabulary(backend, root, edited):
    """Its embedding is used, and other tokens that the target lacks change nothing."""
    config, rng = read_config(root / "deepspec"), np.random.default_rng(2)
    vocab_size, mask = config["vocab_size"], config["mask_token_id"]

    def widen(tensors):
        for name, tensor in tensors.items():
            if len(tensor) == vocab_size:
                rows = rng.normal(size=(3, tensor.shape[1])).astype(np.float32)
                tensors[name] = np.concatenate([tensor, rows])
        tensors["embed_tokens.weight"][vocab_size + 1] = tensors["embed_tokens.weight"][mask]

    settings = {"vocab_size": vocab_size + 3, "mask_token_id": vocab_size + 1}
    wide = edited("deepspec", widen, **settings)
    same, other = (scores(load_pair(root, x, backend)) for x in ("deepspec", wide))
    np.testing.assert_allclose(same, other, atol=1e-5)
    tensors = read_tensors(wide)
    del tensors["embed_tokens.weight"]
    save(wide, read_config(wide), tensors)
    with pytest.raises(CheckpointError, match="its vocabulary has 27 tokens, the target's has 24"):
        load_pair(root, wide, backend)


GATED = {
    "architectures": ["Qwen35DSparkModel"],
    "enable_qwen35_gated_q_proj": True,
    "rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 0.5},
}
"""DeepSpec's layers with the queries of Qwen3.5, a part of which is rotated."""


def gated_tensors(tensors):
    rng = np.random.default_rng(2)
    for name, x in tensors.items():
        if name.endswith("q_proj.weight"):
            size = 2 * len(x), x.shape[1]
            tensors[name] = rng.normal(scale=0.5, size=size).astype(np.float32)
        if name.endswith("norm.weight"):
            tensors[name] = rng.normal(scale=0.3, size=x.shape).astype(np.float32)


def gated_block(config, stored, features, root):
    """(S, vocab) log probabilities of a block, by the published formula on the stored tensors."""
    t = {name.removeprefix("model."): x.astype(np.float64) for name, x in stored.items()}
    d, kv_heads, p = config["head_dim"], config["num_key_value_heads"], len(features)

    def norm(name, x):
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / scale * (1 + t[f"{name}.weight"])

    def linear(name, x):
        return x @ t[f"{name}.weight"].T

    def rotated(x, first):
        turned = d // 2
        angles = (first + np.arange(len(x)))[:, None, None] * 1000.0 ** -(
            np.arange(0, turned, 2) / turned
        )
        a, b, rest = x[..., : turned // 2], x[..., turned // 2 : turned], x[..., turned:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def sigmoid(x):
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


@each_backend
def test_gated_queries_follow_the_published_formula(backend, root, edited):
    folder = edited("deepspec", gated_tensors, **GATED)
    with SequenceSession(load_pair(root, folder, "reference"), drafts=True) as sequence:
        sequence.extend([1, 2, 3, 4, 5])
        features = np.concatenate(sequence.state.context)
    expected = gated_block(read_config(folder), read_tensors(folder), features, 6)
    np.testing.assert_allclose(scores(load_pair(root, folder, backend))[0], expected, atol=1e-5)


GROUP = 32
WIDE = "layers.0.mlp.up_proj"
"""The layer with eight bits, when the others have four."""


def quantised(weight, bits):
    """The tensors that MLX stores for a weight, and the numbers that they stand for."""
    groups = weight.reshape(len(weight), -1, GROUP)
    biases = groups.min(-1, keepdims=True)
    scales = (groups.max(-1, keepdims=True) - biases) / (2**bits - 1)
    integers = np.rint((groups - biases) / scales).astype(np.uint8)
    stream = np.unpackbits(integers[..., None], axis=-1, count=bits, bitorder="little")
    words = np.packbits(stream.reshape(len(weight), -1), axis=-1, bitorder="little").view("<u4")
    parts = {"weight": words, "scales": scales[..., 0], "biases": biases[..., 0]}
    return parts, (scales * integers + biases).reshape(weight.shape)


def write_quantised(folder, original):
    """Quantise a drafter into a folder, and write the numbers that are left over the original."""
    config, numbers, stored = read_config(original), read_tensors(original), {}
    for name, weight in list(numbers.items()):
        if weight.ndim == 2 and weight.shape[1] % GROUP == 0:
            base = name.removesuffix(".weight")  # codebooks have no such suffix
            parts, numbers[name] = quantised(weight, 8 if base == WIDE else 4)
            stored |= {f"{base}.{part}": array for part, array in parts.items()}
        else:
            stored[name] = weight
    save(original, config, numbers)
    settings = {"group_size": GROUP, "bits": 4, "mode": "affine"}
    settings |= {WIDE: settings | {"bits": 8}}
    save(folder, config | {"quantization": settings, "quantization_config": settings}, stored)


@pytest.fixture(scope="module", params=["dflash2", "gated queries", "speculators-dspark"])
def packed(request, tmp_path_factory):
    """A folder with a target and a drafter that mlx-vlm has quantised, and its scores in NumPy."""
    root = tmp_path_factory.mktemp("quantised")
    write_target(root / "target", "qwen3", seed=0)
    gated = request.param == "gated queries"
    with pytest.MonkeyPatch.context() as patch:  # wide enough to be quantised
        patch.setattr(models, "RANK", GROUP)
        patch.setitem(models.SELECTOR, "selector_rank", GROUP)
        dialect = "deepspec" if gated else request.param
        write_dialect(root / "plain", root / "target", dialect, seed=1)
    if gated:
        tensors = read_tensors(root / "plain")
        gated_tensors(tensors)
        save(root / "plain", read_config(root / "plain") | GATED, tensors)
    write_quantised(root / "quantised", root / "plain")
    return root, scores(load_pair(root, "plain", "reference"))


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("backend", "bits"), [("reference", None), ("cuda", None), ("mlx", None), ("mlx", 8)]
)
def test_a_quantised_drafter_drafts_as_its_numbers(backend, bits, packed):
    """On MLX, layers with at most `bits` bits stay in their groups; the numbers are the same."""
    root, expected = packed
    pair = load_pair(root, "quantised", backend, draft_bits=bits)
    if backend == "mlx":
        layer = pair.drafter_model.layers[0]
        parts = [layer.self_attn.q_proj, layer.mlp.up_proj]
        assert [getattr(x, "bits", None) for x in parts] == ([4, 8] if bits else [None, None])
    for actual, right in zip(scores(pair), expected, strict=True):
        np.testing.assert_allclose(actual, right, atol=1e-4)
    texts = [
        generate(pair, [1, 2, 3], DecodeConfig(method=method, max_tokens=8))
        for method in ("treeflash", "ar")
    ]
    assert texts[0] == texts[1]
    assert "quantization" not in unknown_keys(read_config(root / "quantised"))
