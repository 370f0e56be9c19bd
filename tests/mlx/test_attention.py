"""Rotary modules and attention under the hooks that run draft trees."""

import importlib
import inspect
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from recordings import recording

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding.tree import DraftTree
from treeflash.testing import require
from treeflash.testing.comparisons import generate

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
import mlx_lm.models
from mlx import nn
from mlx_lm.models.phixtral import RoPEAttention
from treeflash_mlx.attention import TreeHooks, TreePass, attend, fold_group, is_rope
from treeflash_mlx.backend import load

BRANCHED = DraftTree.from_parents(np.arange(3, dtype=np.int32), np.array([-1, 0, 0], np.int32))


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


def test_an_attention_layer_named_after_its_rope_is_not_one(families):
    assert not is_rope(RoPEAttention(64, 4, 16))
    assert families.attempt("phixtral")[0] == "verified"


def test_a_thread_does_not_see_the_tree_of_another():
    rope = nn.RoPE(8)
    x = mx.random.normal((1, 2, 3, 8), key=mx.random.key(0))
    plain = rope(x, offset=5)
    mx.eval(x, plain)  # only this thread can
    hooks = TreeHooks()
    hooks.hook(rope)
    with hooks.forward_pass(TreePass.build([BRANCHED], [5], 99)) as outputs:
        branched = rope(x, offset=5)
        other = run_in_thread(lambda: np.array(rope(x, offset=5)))
        assert run_in_thread(lambda: hooks.tree) is None
    assert not outputs
    assert not mx.array_equal(branched, plain)
    np.testing.assert_array_equal(other, np.array(plain))


@pytest.mark.parametrize("method", ["ar", "treeflash"])
def test_threads_that_share_a_model_decode_as_one_does(pair, method):
    backend = load(*pair, LoadConfig())
    prompts = [[1 + i, 2, 3 + i] for i in range(8)]
    sampling = SamplingConfig(temperature=0.8, seed=5)
    config = DecodeConfig(method=method, max_tokens=12, budget=12, sampling=sampling)
    text = partial(generate, backend, config=config)
    expected = [text(prompt) for prompt in prompts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns in the middle of forward passes
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(text, prompts)) == expected
    finally:
        sys.setswitchinterval(interval)


def run_in_thread(function):
    """Call a function in a new thread; returns its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("batch", [1, 2])
def test_the_heads_of_a_group_are_rows_where_mlx_has_no_fused_kernel(rng, see_device, batch):
    """Wide heads and many rows; the keys of a group are then read once."""
    tree = DraftTree.from_parents(np.zeros(9, np.int32), (np.arange(9, dtype=np.int32) - 1) // 2)
    tree_pass = TreePass.build([tree] * batch, [6] * batch, 99)
    mask = tree_pass.mask(None)
    q = mx.array(rng.normal(size=(batch, 6, 9, 160)), mx.float32)
    k, v = (mx.array(rng.normal(size=(batch, 2, 15, 160)), mx.float32) for _ in "kv")
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=mask)
    assert mx.allclose(fold_group(q, k, v, 0.1, mask), expected, atol=1e-5)
    with recording(mx.fast, "scaled_dot_product_attention") as calls:
        assert attend(tree_pass, q, k, v, None, 0.1, mask) is NotImplemented  # on a CPU
        see_device(mx.gpu)
        assert mx.allclose(attend(tree_pass, q, k, v, None, 0.1, mask), expected, atol=1e-5)
    assert [queries.shape for queries, *_ in calls] == [(batch, 2, 27, 160)]
    for part in (q[:, :, :8], q[:, :2], q[..., :128]):  # few rows, no groups, narrow heads
        width = part.shape[-1]
        others = part, k[..., :width], v[..., :width], None, 0.1, mask[..., : part.shape[2], :]
        assert attend(tree_pass, *others) is NotImplemented
