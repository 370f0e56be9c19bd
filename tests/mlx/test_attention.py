"""Rotary modules and attention under the hooks that run draft trees."""

import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
from recordings import recording

from treeflash.decoding.tree import DraftTree
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
import mlx_lm.models
from mlx import nn
from treeflash_mlx.attention import TreePass, attend, is_rope
from treeflash_mlx.group_attention import attend_by_group


def modules_of_mlx_lm():
    """Every class of module that mlx-lm defines, except one that needs another package."""
    for path in sorted(Path(mlx_lm.models.__path__[0]).glob("*.py")):
        if path.stem != "olmo":
            module = importlib.import_module(f"mlx_lm.models.{path.stem}")
            for kind in vars(module).values():
                if inspect.isclass(kind) and issubclass(kind, nn.Module):
                    yield kind


def test_rotary_modules_are_found_by_what_they_take():
    found = {kind.__name__ for kind in modules_of_mlx_lm() if is_rope(kind.__new__(kind))}
    assert not {"RoPEAttention", "VisionRoPE2D"} & found
    assert {"Llama3RoPE", "YarnRoPE", "SuScaledRoPE", "DeepseekV2YarnRotaryEmbedding"} <= found
    assert all("rope" in name.lower() or "rotary" in name.lower() for name in found - {"NoPE"})
    assert is_rope(nn.RoPE(8))
    assert not is_rope(nn.ALiBi())


@pytest.mark.parametrize("batch", [1, 2])
def test_the_heads_of_a_group_are_rows_where_mlx_has_no_fused_kernel(rng, see_device, batch):
    """Wide heads and many rows; the keys of a group are then read once."""
    tree = DraftTree.from_parents(np.zeros(9, np.int32), (np.arange(9, dtype=np.int32) - 1) // 2)
    tree_pass = TreePass.build([tree] * batch, [6] * batch, 99)
    mask = tree_pass.mask(None)
    q = mx.array(rng.normal(size=(batch, 6, 9, 160)), mx.float32)
    k, v = (mx.array(rng.normal(size=(batch, 2, 15, 160)), mx.float32) for _ in "kv")
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=mask)
    assert mx.allclose(attend_by_group(q, k, v, 0.1, mask), expected, atol=1e-5)
    with recording(mx.fast, "scaled_dot_product_attention") as calls:
        assert attend(tree_pass, q, k, v, None, 0.1, mask) is NotImplemented  # on a CPU
        see_device(mx.gpu)
        assert mx.allclose(attend(tree_pass, q, k, v, None, 0.1, mask), expected, atol=1e-5)
    assert [queries.shape for queries, *_ in calls] == [(batch, 2, 27, 160)]
    for part in (q[:, :, :8], q[:, :2], q[..., :128]):  # few rows, no groups, narrow heads
        width = part.shape[-1]
        others = part, k[..., :width], v[..., :width], None, 0.1, mask[..., : part.shape[2], :]
        assert attend(tree_pass, *others) is NotImplemented


@pytest.mark.parametrize(("rows", "heads"), [(5, 14), (8, 10), (4, 18)])
def test_few_rows_of_large_groups_are_rows_of_one_head(rng, see_device, rows, heads):
    """MLX's kernel for few rows takes 32 rows of a group."""
    tree = DraftTree.from_parents(np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32) - 1)
    tree_pass = TreePass.build([tree] * 2, [6] * 2, 99)
    mask = tree_pass.mask(None)
    q = mx.array(rng.normal(size=(2, heads, rows, 64)), mx.float32)
    k, v = (mx.array(rng.normal(size=(2, 2, 6 + rows, 64)), mx.float32) for _ in "kv")
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=mask)
    see_device(mx.gpu)
    assert mx.allclose(attend(tree_pass, q, k, v, None, 0.1, mask), expected, atol=1e-5)
    few = q[:, :, : 32 // (heads // 2)]
    part = mask[..., : few.shape[2], :]
    assert attend(tree_pass, few, k, v, None, 0.1, part) is NotImplemented
