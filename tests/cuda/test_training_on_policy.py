"""Drafts for training against the target run on each of them alone."""

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.testing import require
from treeflash.testing.models import write_target
from treeflash.training.distillation import Response

require("torch")

import torch
from treeflash_cuda.hf.attention_contexts import MaskedContext, attention_context
from treeflash_cuda.target_loading import load_target
from treeflash_cuda.training.data import FeatureStore, choose_anchors, make_batch, with_drafts
from treeflash_cuda.training.model import ROW_ANCHORS

VOCAB, DEPTHS, TOP = 40, 3, 5


@pytest.fixture(params=["llama", "mistral"])  # without and with a sliding window
def target(request, tmp_path):
    write_target(tmp_path, request.param, seed=1, vocab_size=VOCAB)
    target = load_target(tmp_path, LoadConfig(device="cpu", dtype="float32"), pack=False)
    target.find_scale()
    target.capture((0,))
    return target


@pytest.fixture
def batch(target):
    random = np.random.default_rng(4)
    texts = [
        Response(
            prompt_ids=tuple(random.integers(0, VOCAB, p).tolist()),
            response_ids=tuple(random.integers(0, VOCAB, r).tolist()),
        )
        for p, r in [(3, 20), (9, 7)]
    ]
    store = FeatureStore(target, (0,), texts, TOP, None, 0)
    anchors = [choose_anchors(text, 2 * ROW_ANCHORS, random) for text in texts]
    return make_batch(texts, store.get(range(2)), anchors, DEPTHS)


class Drafter:
    """Drafts the text, and then something else."""

    def __call__(self, part):
        drafts = part.continuations()
        drafts[:, :, 1] = (drafts[:, :, 1] + 1) % VOCAB
        return drafts


def distribution(target, tokens):
    """The target's log probabilities after some tokens."""
    context = MaskedContext.whole_sequence(len(tokens), target.device)
    with torch.no_grad(), attention_context(context):
        output = target.model.get_decoder()(
            input_ids=tokens[None], position_ids=context.positions[None], use_cache=False
        )
    return target.logits(output.last_hidden_state[0, -1]).log_softmax(-1)


def test_every_token_of_a_draft_has_the_targets_distribution(target, batch):
    drafted = with_drafts(batch, Drafter(), target, 0.5, torch.Generator().manual_seed(1))
    drafts = drafted.drafts
    assert len(drafts.columns) == ROW_ANCHORS
    for row in range(len(batch.tokens)):
        for place, column in enumerate(drafts.columns.tolist()):
            anchor = int(batch.anchors[row, column])
            for depth in range(int(batch.valid[row, column].sum())):
                own = drafts.tokens[row, place, :depth]
                log_probs = distribution(target, torch.cat([batch.tokens[row, : anchor + 1], own]))
                best, tokens = log_probs.topk(TOP)
                assert torch.equal(drafts.top_tokens[row, place, depth], tokens)
                torch.testing.assert_close(drafts.top_log_probs[row, place, depth], best)


def test_a_batch_with_drafts_predicts_them_after_themselves(target, batch):
    drafted = with_drafts(batch, Drafter(), target, 0.5, torch.Generator().manual_seed(1))
    own = torch.zeros(batch.valid.shape[:2], dtype=torch.bool)
    own[:, drafted.drafts.columns] = True
    text = batch.continuations()
    rows, previous, rejections = (
        drafted.target_rows(),
        drafted.previous_tokens(),
        drafted.rejections(),
    )
    for index, (row, column, d) in enumerate(batch.valid.nonzero().tolist()):
        anchor = int(batch.anchors[row, column])
        changed = bool(own[row, column])
        assert bool(drafted.is_drafted()[index]) == changed
        expected = (int(text[row, column, d]) + (changed and d == 1)) % VOCAB
        assert int(rows.next_tokens[index]) == expected
        before = int(batch.tokens[row, anchor + d]) + (changed and d == 2)
        assert int(previous[index]) == before % VOCAB
        assert int(rejections[index]) == (d if changed else 0)
    assert drafted.is_drafted().any()
    assert not drafted.is_drafted().all()


def test_no_share_is_the_text_alone(target, batch):
    assert with_drafts(batch, Drafter(), target, 0.0, torch.Generator()) is batch


def test_all_anchors_can_be_drafted(target, batch):
    drafted = with_drafts(batch, Drafter(), target, 1.0, torch.Generator().manual_seed(1))
    assert drafted.is_drafted().all()
