"""FlexAttention's mask sees what the mask by groups sees."""

import pytest

from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda.training import model
from treeflash_cuda.training.model import (
    ROW_ANCHORS,
    block_attention,
    flex_block_attention,
    grouped_block_attention,
)

pytestmark = pytest.mark.sample(1)

SIZE, LENGTH, HEAD_DIM = 4, 37, 16


@pytest.mark.parametrize(("window", "causal"), [(None, False), (6, False), (None, True), (6, True)])
def test_both_kinds_compute_the_same_attention(window, causal, monkeypatch):
    monkeypatch.setattr(model, "_compiled_attention", lambda: model.flex_attention)  # for a CPU
    torch.manual_seed(0)
    anchors = torch.randint(2, LENGTH, (2, 2 * ROW_ANCHORS)).sort().values
    slots = anchors.shape[1] * SIZE
    q = torch.randn(2, 6, slots, HEAD_DIM)
    k, v = torch.randn(2, 2, 2, LENGTH + slots, HEAD_DIM)
    arguments = (anchors, SIZE, LENGTH, window, causal)
    expected = grouped_block_attention(*arguments)(q, k, v)
    found = flex_block_attention(*arguments)(q, k, v)
    assert found.shape == expected.shape == (2, slots, 6, HEAD_DIM)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_cpu_has_no_use_for_flex_attention(monkeypatch):
    monkeypatch.setattr(model, "flex_block_attention", lambda *_: 1 / 0)
    assert block_attention(torch.zeros(1, ROW_ANCHORS, dtype=torch.long), SIZE, LENGTH, None, False)
