"""Attention and its masks, apart from any model and in models that mix kinds of layers."""

import json

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash.reference.backend import load as load_reference
from treeflash.testing import require
from treeflash.testing.models import write_target

require("torch")

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import causal_mask_function
from treeflash_cuda.attention import (
    AttentionContext,
    AttentionInputs,
    GroupedMasks,
    TreeContext,
    group_mask,
    grouped_attention,
)
from treeflash_cuda.backend import load
from treeflash_cuda.cache import SlabCache
from treeflash_cuda.exact import ExactCache, ExactContext
from treeflash_cuda.operations import PYTORCH

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


def test_every_mask_is_grouped_for_itself():
    first, second = masks(2)
    device = first.device
    grouped = GroupedMasks()
    for mask in (first, second, first):
        assert torch.equal(grouped.get(mask, 2, device), group_mask(mask, 2))
    assert grouped.get(first, 2, device) is grouped.get(first, 2, device)
    assert grouped.get(first, 4, device).shape[-2] == 4 * first.shape[-2]
    assert grouped.get(None, 2, device) is None


def test_models_that_mix_windows_match_the_reference(tmp_path):
    write_target(tmp_path, "qwen3", seed=1)
    path = tmp_path / "config.json"
    settings = {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    parents = np.array([-1, 0, 0, 1, 2, 3, 3, 5], np.int32)
    depths = np.array([0, 1, 1, 2, 2, 3, 3, 4], np.int32)
    tree = DraftTree(np.arange(8, dtype=np.int32), parents, depths, np.zeros(8))
    logits = []
    for backend in (load(tmp_path, None, CPU), load_reference(tmp_path, None, CPU)):
        text = SequenceSession(backend)
        text.extend(range(10))
        logits.append(text.logits(tree))
    np.testing.assert_allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("m", [8, 9])
def test_rows_of_a_mask_are_aligned(m):
    (mask,) = masks(1, m=m)
    assert group_mask(mask, 2).stride(-2) % 8 == 0


def in_trees(rotates):
    """The context of three rows, whose layer has perhaps rotated its queries."""
    context = TreeContext(PYTORCH, SlabCache(None, id, torch.arange(3)), None, torch.arange(3))
    if rotates:
        context.rotate(*torch.ones(2, 1, 2, 3, 8), *torch.ones(2, 1, 3, 8))
    return context


def in_exact_mode(stores):
    """The context of three rows, whose layer has perhaps a cache in which it stores no keys."""
    context = ExactContext(5, torch.arange(5, 8), None)
    context.cache = ExactCache([], []) if stores else None
    return context


@pytest.mark.parametrize(
    ("context", "own_mask", "message"),
    [
        (AttentionContext(5, torch.arange(5, 8), None), False, "attends without a mask"),
        (in_trees(False), False, "changes its mask"),
        (in_trees(True), True, "changes its queries after their rotation"),
        (in_exact_mode(False), False, "changes its mask, which exact mode does not support"),
        (in_exact_mode(True), True, "does not attend to the keys that it stores"),
    ],
)
def test_layers_that_attend_to_something_else_are_refused(context, own_mask, message):
    mask = context.mask(causal_mask_function, torch.float32, None) if own_mask else None
    q, k, v = torch.ones(3, 1, 2, 3, 8)
    with pytest.raises(UnsupportedModelError, match=message):
        context.attend(AttentionInputs(nn.Module(), q, k, v, mask, 1.0))
