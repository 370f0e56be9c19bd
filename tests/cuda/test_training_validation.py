"""Validation against plain loops over the held-out tokens."""

from statistics import fmean

import pytest

from treeflash.config import LoadConfig
from treeflash.testing import require
from treeflash.testing.models import write_target
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response

require("torch")

import torch
from torch import nn
from treeflash_cuda.target_loading import load_target
from treeflash_cuda.training.loop import Validation
from treeflash_cuda.training.losses import Outcomes, forward_kl
from treeflash_cuda.training.model import Prediction

LAYER_IDS = (0, 2)
DEPTHS, VOCAB = 4, 40
LENGTHS = [(3, 12), (5, 7), (1, 2)]


class PartlyRight(nn.Module):
    """A drafter that is usually right."""

    def __init__(self):
        super().__init__()
        self.returned = []

    def forward(self, batch, wanted):
        tokens = batch.block_tokens()[batch.valid]
        both = []
        for share in (0.5, 0.8):
            wrong = torch.rand(len(tokens)) > share
            logits = torch.randn(len(tokens), VOCAB)
            logits[torch.arange(len(tokens)), torch.where(wrong, 7, tokens)] += 9
            both.append(logits.log_softmax(-1))
        self.returned.append(both)
        return tuple(Prediction(full.gather(1, wanted), full.amax(-1)) for full in both)


@pytest.fixture
def validation(tmp_path):
    write_target(tmp_path, "llama", seed=1, vocab_size=40)
    config = LoadConfig(device="cpu", dtype="float32")
    target = load_target(tmp_path, config, pack=False)
    target.find_scale()
    target.capture(LAYER_IDS)
    torch.manual_seed(3)
    texts = [
        Response(
            prompt_ids=tuple(torch.randint(40, (p,)).tolist()),
            response_ids=tuple(torch.randint(40, (r,)).tolist()),
        )
        for p, r in LENGTHS
    ]
    config = TrainConfig(sequences=2, top_tokens=8)
    return Validation(target, LAYER_IDS, texts, DEPTHS, config)


@pytest.mark.parametrize("kind", ["marginal", "corrected"])
def test_means_by_depth_and_the_chain_of_best_tokens(kind, validation):
    blocks = PartlyRight()
    measured = validation.measure(blocks)
    kl = [[] for _ in range(DEPTHS)]
    hits = [[] for _ in range(DEPTHS)]
    acceptance = [[] for _ in range(DEPTHS)]
    lengths = []
    for batch, both in zip(validation.batches, blocks.returned, strict=True):
        full = both[kind == "corrected"]
        best = full.argmax(-1).tolist()
        rows = batch.target_rows()
        outcomes = Outcomes.compare(rows, full.gather(1, rows.scored_tokens()))
        divergences = forward_kl(outcomes).tolist()
        overlaps = outcomes.acceptance().tolist()
        index = 0
        for row, anchors in enumerate(batch.valid.tolist()):
            for column, depths in enumerate(anchors):
                anchor, right = int(batch.anchors[row, column]), []
                for d in range(sum(depths)):
                    right.append(best[index] == int(batch.tokens[row, anchor + d + 1]))
                    hits[d].append(right[-1])
                    kl[d].append(divergences[index])
                    acceptance[d].append(overlaps[index])
                    index += 1
                if depths[0]:  # else this anchor is padding
                    lengths.append([*right, False].index(False))
    assert len({*lengths}) > 2, "the chains must end at different depths"
    assert len(lengths) == sum(r - 1 for _, r in LENGTHS)
    assert measured[f"chain_{kind}"] == pytest.approx(1 + fmean(lengths))
    assert measured[f"top1_{kind}"] == pytest.approx([fmean(values) for values in hits], abs=1e-4)
    assert measured[f"kl_{kind}"] == pytest.approx(
        [fmean(values) for values in kl], abs=1e-4, rel=1e-3
    )
    assert measured[f"acceptance_{kind}"] == pytest.approx(
        [fmean(values) for values in acceptance], abs=1e-4
    )
