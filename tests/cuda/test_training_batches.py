"""Which texts and anchors each forward pass trains on."""

from types import SimpleNamespace

import numpy as np
import pytest

from treeflash.testing import require
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response

require("torch")

import torch
from treeflash_cuda.training.data import Batches, Plan, SequenceFeatures, choose_anchors

CONFIG = TrainConfig(sequences=1, anchors=4, seed=3)


class BlankStore:
    """Texts of one length, with features of zeros."""

    target = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, texts, length=40):
        ids = [tuple(range(n, n + length)) for n in range(texts)]
        self.responses = [Response(prompt_ids=i[:2], response_ids=i[2:]) for i in ids]

    def get(self, numbers):
        count = len(self.responses[0].response_ids)
        features = SequenceFeatures(
            torch.zeros(len(self.responses[0]), 2),
            torch.zeros(count, 1, dtype=torch.int32),
            torch.zeros(count, 1, dtype=torch.float16),
        )
        return [features for _ in numbers]


def test_every_epoch_takes_each_text_once_in_another_order():
    plan = Plan(lengths=[5] * 12, batch=3, seed=1)
    epochs = [np.concatenate([plan[4 * epoch + n] for n in range(4)]) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_holds_texts_of_similar_length():
    plan = Plan(lengths=[n // 2 for n in range(12)], batch=2, seed=1)
    for n in range(6):
        first, second = plan[n]
        assert first // 2 == second // 2


def test_fewer_texts_than_a_batch_are_repeated():
    assert sorted(Plan(lengths=[5, 5], batch=4, seed=1)[7]) == [0, 0, 1, 1]


def test_a_text_gets_other_anchors_in_every_epoch():
    batches = Batches(BlankStore(texts=1), CONFIG, 4, process=0, processes=1)
    chosen = [tuple(batches[n].anchors[0, :4].tolist()) for n in range(4)]
    assert len(set(chosen)) == 4
    assert chosen[2] == tuple(batches[2].anchors[0, :4].tolist())


def test_processes_share_the_texts_out_and_choose_other_anchors():
    store = BlankStore(texts=2)
    batches = [Batches(store, CONFIG, 4, process, processes=2)[0] for process in range(2)]
    assert {int(batch.tokens[0, 0]) for batch in batches} == {0, 1}
    assert not torch.equal(batches[0].anchors, batches[1].anchors)


@pytest.mark.parametrize("count", [3, 6, 99])
def test_anchors_are_positions_of_the_response_with_a_token_after_them(count):
    text = Response(prompt_ids=(1, 2, 3), response_ids=tuple(range(7)))
    anchors = choose_anchors(text, count, np.random.default_rng(0)).tolist()
    assert anchors == sorted(set(anchors))
    assert len(anchors) == min(count, 6)
    assert set(anchors) <= set(range(3, 9))
