"""Training computes what decoding does: many blocks in one pass equal one draft at a time."""

from dataclasses import replace

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.text_session import TextSession
from treeflash.testing import require
from treeflash.testing.models import edit_config, write_drafter, write_target
from treeflash.training.interfaces import Response

require("torch")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from treeflash_cuda.backend import load  # noqa: E402
from treeflash_cuda.training.batches import choose_anchors, make_batch  # noqa: E402
from treeflash_cuda.training.blocks import Blocks  # noqa: E402
from treeflash_cuda.training.features import FeatureStore  # noqa: E402

CPU = LoadConfig(device="cpu", dtype="float32")
TOP = 5


def texts(vocab_size=40):
    random = np.random.default_rng(5)

    def ids(count):
        return tuple(random.integers(0, vocab_size, count).tolist())

    return [Response(prompt_ids=ids(p), response_ids=ids(r)) for p, r in [(3, 20), (11, 7), (1, 2)]]


def near(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(params=["full", "sliding", "causal", "scaled", "mistral"])
def backend(request, tmp_path):
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    family = "mistral" if request.param == "mistral" else "llama"
    write_target(target, family, seed=1, vocab_size=40)
    window = 6 if request.param == "sliding" else None
    write_drafter(drafter, target, seed=2, sliding_window=window)
    if request.param == "causal":
        edit_config(drafter, lambda config: config.update(is_causal=True))
    if request.param == "scaled":
        edit_config(drafter, lambda config: config.update(input_embedding_scale=2.5))
    return load(target, drafter, CPU)


@torch.no_grad()
def test_features_of_a_target_in_half_precision_are_accepted(tmp_path):
    """Drafters are trained in float32, also if the target runs in half precision."""
    write_target(tmp_path / "target", "llama", seed=1, vocab_size=40)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=2)
    backend = load(tmp_path / "target", tmp_path / "drafter", CPU)
    model = backend.drafter_model
    store = FeatureStore(backend.target, model.config.target_layer_ids, texts(), TOP, None, 0)
    anchors = [choose_anchors(text, 9, np.random.default_rng(1)) for text in store.texts]
    batch = make_batch(store.texts, store.get(range(3)), anchors, model.config.block_size)
    blocks = Blocks(model, backend.head.module, backend.target.embeddings)
    rounded = blocks.hidden(replace(batch, features=batch.features.bfloat16()))
    exact = blocks.hidden(batch)
    assert 0 < (rounded - exact).std() < 0.05 * exact.std()


@torch.no_grad()
def test_blocks_equal_the_drafts_of_the_drafter(backend):
    model, head = backend.drafter_model, backend.head
    size = model.config.block_size
    layer_ids = model.config.target_layer_ids
    store = FeatureStore(backend.target, layer_ids, texts(), TOP, None, 0)
    random = np.random.default_rng(1)
    anchors = [choose_anchors(text, 9, random) for text in store.texts]
    batch = make_batch(store.texts, store.get(range(3)), anchors, size)
    blocks = Blocks(model, head.module, backend.target.embeddings)
    hidden = blocks.hidden(batch)
    marginal, corrected = blocks(batch)
    predicted = 0
    for row, text in enumerate(store.texts):
        for column, anchor in enumerate(anchors[row].tolist()):
            with TextSession(backend, drafts=True) as drafted:
                drafted.extend(text.token_ids[:anchor])
                block = drafted.draft(text.token_ids[anchor])
            near(hidden[row, column, 1:], block.hidden)
            normed = model.norm(block.hidden)
            for depth in range(1, min(size, len(text) - anchor)):
                previous = torch.tensor([text.token_ids[anchor + depth - 1]])
                embedded = F.embedding(previous, backend.target.embeddings)
                correction = head.module(embedded, normed[depth - 1 : depth], None)[0]
                near(marginal[predicted], normed[depth - 1])
                near(corrected[predicted], model.norm(block.hidden[depth - 1] + correction))
                assert [part[predicted] for part in batch.predicted()] == [row, anchor + depth]
                predicted += 1
    assert predicted == len(marginal) == len(corrected)


def test_features_and_top_tokens_are_those_of_the_target(backend, tmp_path):
    layer_ids = backend.drafter_config.target_layer_ids
    folder = tmp_path / "features"
    folder.mkdir()
    store = FeatureStore(backend.target, layer_ids, texts(), TOP, folder, 1e9)
    fresh = store.get(range(3))
    store.fill(0)
    assert [path.name for path in folder.iterdir()] == ["00000.safetensors"]
    for text, computed, kept in zip(store.texts, fresh, store.get(range(3)), strict=True):
        decoded = TextSession(backend, drafts=True)
        decoded.extend(text.token_ids)
        (projected,) = decoded.state.context
        outputs = [decoded.state.outputs[i] for i in backend.drafter_config.target_layer_ids]
        near(computed.features, torch.cat(outputs, -1))
        near(backend.drafter_model.project(computed.features), projected)
        assert torch.equal(kept.features, computed.features)
        assert torch.equal(kept.top_tokens, computed.top_tokens)
        assert computed.top_tokens.shape == (len(text.response_ids), TOP)
        first = len(text.prompt_ids)
        chosen = TextSession(backend).extend(text.token_ids[: first + 1])
        assert computed.top_tokens[1, 0] == chosen
        assert (computed.top_log_probs.float().exp().sum(-1) <= 1.01).all()


def test_nothing_is_cached_beyond_the_size_limit(backend, tmp_path):
    layer_ids = backend.drafter_config.target_layer_ids
    store = FeatureStore(backend.target, layer_ids, texts(), TOP, tmp_path, -1)
    store.fill(0)
    assert not list(tmp_path.glob("*.safetensors"))
    assert len(store.get([1])[0].features) == len(store.texts[1])
