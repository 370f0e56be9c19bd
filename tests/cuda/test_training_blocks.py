"""Training computes what decoding does: many blocks in one pass equal one draft at a time."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from parts import use_models

from treeflash.config import LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.testing import require
from treeflash.testing.models import edit_config, write_drafter, write_target
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response

require("torch")

import torch
from safetensors.torch import save_file
from treeflash_cuda.backend import load
from treeflash_cuda.target_loading import load_target
from treeflash_cuda.training.batch import Drafts
from treeflash_cuda.training.data import FeatureStore, choose_anchors, make_batch
from treeflash_cuda.training.initial import drafter_settings, initial_drafter
from treeflash_cuda.training.model import Blocks, make_shortlist

pytestmark = pytest.mark.sample(2)

CPU = LoadConfig(device="cpu", dtype="float32")
TOP = 5


def texts(vocab_size=40):
    random = np.random.default_rng(5)

    def ids(count):
        return tuple(random.integers(0, vocab_size, count).tolist())

    return [Response(prompt_ids=ids(p), response_ids=ids(r)) for p, r in [(3, 20), (11, 7), (1, 2)]]


def save_drafter(target, folder, head):
    """A drafter with this head and random weights."""
    config = TrainConfig(init="random", layers=2, block_size=4, head=head, head_size=6)
    model = load_target(target, CPU, pack=False)
    settings = drafter_settings(config, model)
    drafter, module = initial_drafter(config, settings, model, [])
    blocks = Blocks(drafter, module, model.embeddings, model.lm_head)
    for parameter in blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(blocks.state_dict(), folder / "model.safetensors")


def near(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module", autouse=True)
def models():
    """Targets are models of transformers, as in training."""
    with pytest.MonkeyPatch.context() as patch:
        use_models(patch)
        yield


@pytest.fixture(
    scope="module",
    params=["full", "sliding", "causal", "scaled", "mistral", "none", "markov", "selector"],
)
def backend(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    target, drafter = folder / "target", folder / "drafter"
    family = "mistral" if request.param == "mistral" else "llama"
    write_target(target, family, seed=1, vocab_size=40)
    if request.param in ("none", "markov", "selector"):
        save_drafter(target, drafter, request.param)
        return load(target, drafter, CPU)
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
    anchors = [choose_anchors(text, 9, np.random.default_rng(1)) for text in store.responses]
    batch = make_batch(store.responses, store.get(range(3)), anchors, model.config.depths)
    blocks = made(backend)
    rounded = blocks.hidden(replace(batch, features=batch.features.bfloat16()))
    exact = blocks.hidden(batch)
    assert 0 < (rounded - exact).std() < 0.05 * exact.std()


def made(backend):
    target = backend.target
    module = None if backend.head is None else backend.head.module
    head = SimpleNamespace(weight=target.lm_head_weight)  # the layer itself is packed
    return Blocks(backend.drafter_model, module, target.embeddings, head)


def make_batch_of(backend, seed=1, top_tokens=TOP):
    """Three texts with random anchors; the texts, the anchors, and the batch."""
    config = backend.drafter_config
    store = FeatureStore(backend.target, config.target_layer_ids, texts(), top_tokens, None, 0)
    random = np.random.default_rng(seed)
    anchors = [choose_anchors(text, 9, random) for text in store.responses]
    return (
        store.responses,
        anchors,
        make_batch(store.responses, store.get(range(3)), anchors, config.depths),
    )


@torch.no_grad()
def test_blocks_equal_the_drafts_of_the_drafter(backend):
    all_texts, anchors, batch = make_batch_of(backend)
    blocks = made(backend)
    hidden = blocks.hidden(batch)
    rows = batch.target_rows()
    every = torch.arange(40).expand(len(rows.next_tokens), -1)
    predictions = blocks(batch, every)
    predicted = 0
    for row, text in enumerate(all_texts):
        for column, anchor in enumerate(anchors[row].tolist()):
            with SequenceSession(backend, drafts=True) as drafted:
                drafted.extend(text.token_ids[:anchor])
                block = drafted.draft(text.token_ids[anchor])
            near(hidden[row, column], block.hidden)
            known = text.token_ids[anchor : anchor + backend.drafter_config.depths]
            previous = np.zeros(backend.drafter_config.depths, np.int32)
            previous[: len(known)] = known
            expected = [backend.drafter.log_probs(block)]
            if backend.head is not None:
                expected.append(backend.head.log_probs(block, previous))
            for depth in range(1, min(len(block.hidden), len(text) - 1 - anchor) + 1):
                for prediction, log_probs in zip(predictions, expected, strict=False):
                    own = torch.from_numpy(log_probs[depth - 1])
                    assert float(prediction.best[predicted]) == pytest.approx(float(own.max()))
                    scored = own.isfinite()  # a selector's candidates alone
                    assert scored.sum() > 1
                    near(prediction.log_probs[predicted][scored], own[scored])
                assert rows.next_tokens[predicted] == text.token_ids[anchor + depth]
                predicted += 1
    assert predicted == len(rows.next_tokens) == len(predictions[0].best)


@torch.no_grad()
def test_a_shortlist_of_everything_changes_nothing(backend):
    """Only the order of its tokens, and of the tokens that represent the rest, differs."""
    _, _, batch = make_batch_of(backend)
    blocks, wanted = made(backend), batch.target_rows().scored_tokens()
    missing = 40 - len(wanted.unique())
    shortlist = make_shortlist(wanted, 40, missing - 1, torch.Generator().manual_seed(1))
    everything = replace(
        shortlist,
        tokens=torch.arange(40),
        num_scored=40,
        log_weights=torch.zeros(40),
        index=torch.arange(40),
    )
    both = blocks(batch, wanted, everything), blocks(batch, wanted)
    for found, expected in zip(*both, strict=True):
        if expected is not None:
            near(found.log_probs, expected.log_probs)
    assert blocks(batch, wanted, shortlist)[0].log_probs.shape == wanted.shape


@torch.no_grad()
def test_a_drafted_block_follows_its_own_best_tokens(backend):
    """Each token is the best one after the drafted token before it, not after the text's."""
    _, _, batch = make_batch_of(backend)
    blocks = made(backend)
    drafts = blocks(batch)
    chain = torch.cat([batch.tokens.gather(1, batch.anchors)[:, :, None], drafts], 2)
    columns = torch.arange(batch.anchors.shape[1])
    no_scores = torch.zeros(*drafts.shape, TOP)
    own = replace(
        batch,
        valid=torch.ones_like(batch.valid),
        drafts=Drafts(columns, chain[:, :, 1:], no_scores.long(), no_scores),
    )
    every = torch.arange(40).expand(drafts.numel(), -1)
    *_, last = (part for part in blocks(own, every) if part is not None)
    assert torch.equal(last.log_probs.argmax(-1), drafts.flatten())


def test_features_and_top_tokens_are_those_of_the_target(backend, tmp_path):
    layer_ids = backend.drafter_config.target_layer_ids
    folder = tmp_path / "features"
    folder.mkdir()
    store = FeatureStore(backend.target, layer_ids, texts(), TOP, folder, 1e9)
    fresh = store.get(range(3))
    store.fill(0)
    assert [path.name for path in folder.iterdir()] == ["00000.safetensors"]
    for text, computed, kept in zip(store.responses, fresh, store.get(range(3)), strict=True):
        decoded = SequenceSession(backend, drafts=True)
        with torch.inference_mode():
            found = backend.verifier.forward([(decoded.state, text.token_ids)], [False])
        decoded.extend(text.token_ids)
        (projected,) = decoded.state.context
        outputs = [found.rows[0].outputs.layers[i] for i in backend.drafter_config.target_layer_ids]
        near(computed.features, torch.cat(outputs, -1))
        near(backend.drafter_model.project(computed.features), projected)
        assert torch.equal(kept.features, computed.features)
        assert torch.equal(kept.top_tokens, computed.top_tokens)
        assert computed.top_tokens.shape == (len(text.response_ids), TOP)
        first = len(text.prompt_ids)
        chosen = SequenceSession(backend).extend(text.token_ids[: first + 1])
        assert computed.top_tokens[1, 0] == chosen
        assert (computed.top_log_probs.float().exp().sum(-1) <= 1.01).all()


def test_nothing_is_cached_beyond_the_size_limit(backend, tmp_path):
    layer_ids = backend.drafter_config.target_layer_ids
    store = FeatureStore(backend.target, layer_ids, texts(), TOP, tmp_path, -1)
    store.fill(0)
    assert not list(tmp_path.glob("*.safetensors"))
    assert len(store.get([1])[0].features) == len(store.responses[1])
