"""Attention with groups of heads, and its masks."""

import pytest

from treeflash.config import LoadConfig
from treeflash.testing import require

require("torch")

import torch
import torch.nn.functional as F
from treeflash_cuda.attention import (
    group_mask,
    grouped_attention,
)

CPU = LoadConfig(device="cpu", dtype="float32")


def masks(count, n=3, m=10):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, n, m, generator=random) for _ in range(count)]


def test_grouped_attention_is_attention_with_repeated_keys():
    random = torch.Generator().manual_seed(1)
    q = torch.randn(2, 6, 3, 8, generator=random)
    k, v = torch.randn(2, 2, 2, 10, 8, generator=random)
    (mask,) = masks(1)
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=mask, scale=0.3
    )
    actual = grouped_attention(q, [(k, v)], [group_mask(mask, 3)], [3], 0.3)
    torch.testing.assert_close(actual, expected.transpose(1, 2))
    assert actual.is_contiguous()


@pytest.mark.parametrize("m", [8, 9])
def test_rows_of_a_mask_are_aligned(m):
    (mask,) = masks(1, m=m)
    assert group_mask(mask, 2).stride(-2) % 8 == 0
