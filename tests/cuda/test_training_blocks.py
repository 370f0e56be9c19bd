"""Training computes what decoding does: many blocks in one pass equal one draft at a time.

So do drafts for training, which the target scores together, both kinds of attention, and the
numbers of a validation.
"""

import json
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
from parts import use_models
from small_training import CPU, TINY_VOCAB, texts_of
from stand_ins import stand_in

from treeflash.decoding.session import SequenceSession
from treeflash.testing import require
from treeflash.testing.models import edit_config, write_drafter, write_target
from treeflash.training.config import TrainConfig

require("torch")

import torch
from safetensors.torch import save_file
from treeflash_cuda.backend import load
from treeflash_cuda.hf.attention_contexts import MaskedContext, attention_context
from treeflash_cuda.target_loading import load_target
from treeflash_cuda.training import model
from treeflash_cuda.training.batch import Drafts
from treeflash_cuda.training.data import FeatureStore, choose_anchors, make_batch, with_drafts
from treeflash_cuda.training.initial import drafter_settings, initial_drafter
from treeflash_cuda.training.loop import Validation
from treeflash_cuda.training.losses import Outcomes, forward_kl
from treeflash_cuda.training.model import (
    ROW_ANCHORS,
    Blocks,
    Prediction,
    block_attention,
    flex_block_attention,
    make_shortlist,
)

pytestmark = pytest.mark.sample(2)

TOP = 5
TEXTS = texts_of((3, 20), (11, 7), (1, 2))


def save_drafter(target, folder, head):
    """A drafter with this head and random weights."""
    config = TrainConfig(init="random", layers=2, block_size=4, head=head, head_size=6)
    loaded = load_target(target, CPU, pack=False)
    settings = drafter_settings(config, loaded)
    drafter, module = initial_drafter(config, settings, loaded, [])
    blocks = Blocks(drafter, module, loaded.embeddings, loaded.lm_head)
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
    write_target(target, family, seed=1, vocab_size=TINY_VOCAB)
    if request.param in ("none", "markov", "selector"):
        save_drafter(target, drafter, request.param)
    else:
        window = 6 if request.param == "sliding" else None
        write_drafter(drafter, target, seed=2, sliding_window=window)
    settings = {"causal": {"is_causal": True}, "scaled": {"input_embedding_scale": 2.5}}
    edit_config(drafter, lambda config: config.update(settings.get(request.param, {})))
    return load(target, drafter, CPU)


def stored(target, layer_ids, texts=TEXTS, folder=None, max_bytes=0):
    return FeatureStore(target, layer_ids, texts, TOP, folder, max_bytes)


def batch_of(store, count, depths):
    """All texts of a store with random anchors."""
    random = np.random.default_rng(1)
    anchors = [choose_anchors(text, count, random) for text in store.responses]
    return make_batch(store.responses, store.get(range(len(anchors))), anchors, depths)


@pytest.fixture
def blocks(backend):
    module = None if backend.head is None else backend.head.module
    head = SimpleNamespace(weight=backend.target.lm_head_weight)  # the layer itself is packed
    return Blocks(backend.drafter_model, module, backend.target.embeddings, head)


@pytest.fixture
def batch(backend):
    config = backend.drafter_config
    return batch_of(stored(backend.target, config.target_layer_ids), 9, config.depths)


@torch.no_grad()
def test_features_of_a_target_in_half_precision_are_accepted(blocks, batch):
    """Drafters are trained in float32, also if the target runs in half precision."""
    rounded = blocks.hidden(replace(batch, features=batch.features.bfloat16()))
    exact = blocks.hidden(batch)
    assert 0 < (rounded - exact).std() < 0.05 * exact.std()


@torch.no_grad()
def test_blocks_equal_the_drafts_of_the_drafter(backend, blocks, batch):
    hidden, depths = blocks.hidden(batch), backend.drafter_config.depths
    following = batch.scored()[0][:, -1]
    predictions = blocks(batch, torch.arange(TINY_VOCAB).expand(len(following), -1))
    predicted = 0
    for row, text in enumerate(TEXTS):
        for column in batch.valid[row].any(1).nonzero().flatten().tolist():
            anchor = int(batch.anchors[row, column])
            with SequenceSession(backend, drafts=True) as drafted:
                drafted.extend(text.token_ids[:anchor])
                block = drafted.draft(text.token_ids[anchor])
            near(hidden[row, column], block.hidden)
            known = text.token_ids[anchor : anchor + depths]
            previous = np.zeros(depths, np.int32)
            previous[: len(known)] = known
            expected = [backend.drafter.log_probs(block)]
            if backend.head is not None:
                expected.append(backend.head.log_probs(block, previous))
            for depth in range(1, min(depths, len(text) - 1 - anchor) + 1):
                for prediction, log_probs in zip(predictions, expected, strict=False):
                    own = torch.from_numpy(log_probs[depth - 1])
                    assert float(prediction.best[predicted]) == pytest.approx(float(own.max()))
                    scored = own.isfinite()  # a selector's candidates alone
                    assert scored.sum() > 1
                    near(prediction.log_probs[predicted][scored], own[scored])
                assert following[predicted] == text.token_ids[anchor + depth]
                predicted += 1
    assert predicted == len(following) == len(predictions[0].best)


@torch.no_grad()
def test_a_shortlist_of_everything_changes_nothing(blocks, batch):
    """Only the order of its tokens, and of the tokens that represent the rest, differs."""
    wanted, _ = batch.scored()
    missing = TINY_VOCAB - len(wanted.unique())
    shortlist = make_shortlist(wanted, TINY_VOCAB, missing - 1, torch.Generator().manual_seed(1))
    everything = replace(
        shortlist,
        tokens=torch.arange(TINY_VOCAB),
        num_scored=TINY_VOCAB,
        log_weights=torch.zeros(TINY_VOCAB),
        index=torch.arange(TINY_VOCAB),
    )
    both = blocks(batch, wanted, everything), blocks(batch, wanted)
    for found, expected in zip(*both, strict=True):
        if expected is not None:
            near(found.log_probs, expected.log_probs)
    assert blocks(batch, wanted, shortlist)[0].log_probs.shape == wanted.shape


@torch.no_grad()
def test_a_drafted_block_follows_its_own_best_tokens(blocks, batch):
    """Each token is the best one after the drafted token before it, not after the text's."""
    drafts = blocks(batch)
    no_scores = torch.zeros(*drafts.shape, TOP)
    own = replace(
        batch,
        valid=torch.ones_like(batch.valid),
        drafts=Drafts(torch.arange(drafts.shape[1]), drafts, no_scores.long(), no_scores),
    )
    every = torch.arange(TINY_VOCAB).expand(drafts.numel(), -1)
    *_, last = (part for part in blocks(own, every) if part is not None)
    assert torch.equal(last.log_probs.argmax(-1), drafts.flatten())


def test_features_and_top_tokens_are_those_of_the_target(backend, tmp_path):
    layer_ids = backend.drafter_config.target_layer_ids
    store = stored(backend.target, layer_ids, folder=tmp_path, max_bytes=1e9)
    fresh = store.get(range(3))
    store.fill(0)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.safetensors"]
    for text, computed, kept in zip(TEXTS, fresh, store.get(range(3)), strict=True):
        decoded = SequenceSession(backend, drafts=True)
        with torch.inference_mode():
            found = backend.verifier.forward([(decoded.state, text.token_ids)], [False])
        decoded.extend(text.token_ids)
        (projected,) = decoded.state.context
        outputs = [found.rows[0].outputs.layers[i] for i in layer_ids]
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
    store = stored(backend.target, layer_ids, folder=tmp_path, max_bytes=-1)
    store.fill(0)
    assert not list(tmp_path.iterdir())
    assert len(store.get([1])[0].features) == len(TEXTS[1])


@pytest.mark.sample(1)
@pytest.mark.parametrize(("window", "causal"), [(None, False), (6, False), (None, True), (6, True)])
def test_flex_attention_sees_what_the_mask_of_a_cpu_sees(window, causal, monkeypatch):
    compiled = []

    def uncompiled():
        compiled.append(True)
        return model.flex_attention

    stand_in(monkeypatch, model, _compiled_attention=uncompiled)
    torch.manual_seed(0)
    size, length = 4, 37
    anchors = torch.randint(2, length, (2, 2 * ROW_ANCHORS)).sort().values
    slots = anchors.shape[1] * size
    q = torch.randn(2, 6, slots, 16)
    k, v = torch.randn(2, 2, 2, length + slots, 16)
    arguments = (anchors, size, length, window, causal)
    expected = block_attention(*arguments)(q, k, v)
    assert not compiled
    found = flex_block_attention(*arguments)(q, k, v)
    assert compiled
    assert found.shape == expected.shape == (2, slots, 6, 16)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


LAYER_IDS = (0, 2)


def training_target(folder, family):
    """A target as a run loads it, with features of two layers."""
    write_target(folder, family, seed=1, vocab_size=TINY_VOCAB)
    target = load_target(folder, CPU, pack=False)
    target.find_scale()
    target.capture(LAYER_IDS)
    return target


@pytest.fixture(scope="module", params=["llama", "mistral"])  # without and with a sliding window
def target(request, tmp_path_factory):
    return training_target(tmp_path_factory.mktemp("target"), request.param)


def drafter(part):
    """Draft the text, and then something else."""
    drafts = part.continuations()
    drafts[:, :, 1] = (drafts[:, :, 1] + 1) % TINY_VOCAB
    return drafts


@pytest.fixture
def share_drafted(target):
    """Make a batch of which a share is drafted, and return it as it was and as it is."""

    def draft(share):
        batch = batch_of(stored(target, LAYER_IDS, TEXTS[:2]), 2 * ROW_ANCHORS, 3)
        generator = torch.Generator().manual_seed(1)
        return batch, with_drafts(batch, drafter, target, share, generator)

    return draft


def test_every_token_of_a_draft_has_the_targets_distribution(target, share_drafted):
    batch, drafted = share_drafted(0.5)
    drafts = drafted.drafts
    assert len(drafts.columns) == ROW_ANCHORS
    for row, place in np.ndindex(*drafts.tokens.shape[:2]):
        column = int(drafts.columns[place])
        text = batch.tokens[row, : int(batch.anchors[row, column]) + 1]
        for depth in range(int(batch.valid[row, column].sum())):
            tokens = torch.cat([text, drafts.tokens[row, place, :depth]])
            context = MaskedContext.whole_sequence(len(tokens), target.device)
            with torch.no_grad(), attention_context(context):
                output = target.model.get_decoder()(
                    input_ids=tokens[None], position_ids=context.positions[None], use_cache=False
                )
            log_probs = target.logits(output.last_hidden_state[0, -1]).log_softmax(-1)
            best, top = log_probs.topk(TOP)
            assert torch.equal(drafts.top_tokens[row, place, depth], top)
            torch.testing.assert_close(drafts.top_log_probs[row, place, depth], best)


def test_a_batch_with_drafts_predicts_them_after_themselves(share_drafted):
    batch, drafted = share_drafted(0.5)
    own = torch.zeros(batch.valid.shape[:2], dtype=torch.bool)
    own[:, drafted.drafts.columns] = True
    text, (scored, _) = batch.continuations(), drafted.scored()
    previous, rejections = drafted.previous_tokens(), drafted.rejections()
    for index, (row, column, d) in enumerate(batch.valid.nonzero().tolist()):
        anchor = int(batch.anchors[row, column])
        changed = bool(own[row, column])
        assert bool(drafted.is_drafted()[index]) == changed
        expected = (int(text[row, column, d]) + (changed and d == 1)) % TINY_VOCAB
        assert int(scored[index, -1]) == expected
        before = int(batch.tokens[row, anchor + d]) + (changed and d == 2)
        assert int(previous[index]) == before % TINY_VOCAB
        assert int(rejections[index]) == (d if changed else 0)
    assert drafted.is_drafted().any()
    assert not drafted.is_drafted().all()


def test_none_or_all_of_the_anchors_can_be_drafted(share_drafted):
    batch, drafted = share_drafted(0.0)
    assert drafted is batch
    assert share_drafted(1.0)[1].is_drafted().all()


class PartlyRight(torch.nn.Module):
    """A drafter that is usually right."""

    def __init__(self):
        super().__init__()
        self.returned = []

    def forward(self, batch, wanted):
        tokens = batch.block_tokens()[batch.valid]
        both = []
        for share in (0.5, 0.8):
            wrong = torch.rand(len(tokens)) > share
            logits = torch.randn(len(tokens), TINY_VOCAB)
            logits[torch.arange(len(tokens)), torch.where(wrong, 7, tokens)] += 9
            both.append(logits.log_softmax(-1))
        self.returned.append(both)
        return tuple(Prediction(full.gather(1, wanted), full.amax(-1)) for full in both)


def test_a_validation_has_means_by_depth_and_the_chain_of_best_tokens(tmp_path):
    torch.manual_seed(3)
    depths, texts, drafter = 4, texts_of((3, 12), (5, 7), (1, 2)), PartlyRight()
    config = TrainConfig(sequences=2, top_tokens=8)
    validation = Validation(training_target(tmp_path, "llama"), LAYER_IDS, texts, depths, config)
    measured = validation.measure(drafter)
    for kind, name in enumerate(("marginal", "corrected")):
        metrics = {metric: [[] for _ in range(depths)] for metric in ("kl", "top1", "acceptance")}
        lengths = []
        for batch, both in zip(validation.batches, drafter.returned, strict=True):
            (scored, target), best = batch.scored(), both[kind].argmax(-1)
            outcomes = Outcomes.compare(target, both[kind].gather(1, scored))
            own = {
                "kl": forward_kl(outcomes),
                "top1": best == scored[:, -1],
                "acceptance": outcomes.acceptance(),
            }
            chains = {}
            for index, (row, column, d) in enumerate(batch.valid.nonzero().tolist()):
                for metric, values in own.items():
                    metrics[metric][d].append(float(values[index]))
                chains.setdefault((row, column), []).append(bool(own["top1"][index]))
            lengths += [[*chain, False].index(False) for chain in chains.values()]
        assert len({*lengths}) > 2, "the chains must end at different depths"
        assert len(lengths) == sum(len(text.response_ids) - 1 for text in texts)
        assert measured[f"chain_{name}"] == pytest.approx(1 + fmean(lengths))
        for metric, values in metrics.items():
            expected = [fmean(by_depth) for by_depth in values]
            assert measured[f"{metric}_{name}"] == pytest.approx(expected, abs=1e-4, rel=1e-3)
