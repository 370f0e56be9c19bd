"""Kernels for prompts on a GPU, and their check at load."""

import pytest

from treeflash.testing import require

require("torch")

import torch
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)
from treeflash_cuda.cache import dequantise, quantise
from treeflash_cuda.gpu import kernels as kernels_module
from treeflash_cuda.gpu.kernels import causal_attention, seen_floats
from treeflash_cuda.hf.attention_contexts import is_window
from treeflash_cuda.operations import Shapes


def test_windows_are_known():
    sliding = sliding_window_causal_mask_function(4)
    assert is_window(sliding, 4)
    assert not is_window(sliding, 5)
    assert not is_window(sliding, 3)
    assert not is_window(sliding, None)
    assert not is_window(causal_mask_function, 4)
    chunked = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    assert not is_window(chunked, 4)


def rounding(q, k, v, window, scale):
    """As fused kernels do: the softmax is rounded to the dtype before the product with values."""
    columns = torch.arange(len(k))
    distance = columns[len(k) - len(q) :, None] - columns
    visible = (distance >= 0) & (distance < (window or len(k)))
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).float() for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), keys) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(q.dtype).float()
    return torch.einsum("hnm,mhd->nhd", weights, values).to(q.dtype)


def one_row_short(q, k, v, window, scale):
    """The last position does not see itself."""
    out = rounding(q, k, v, window, scale)
    return torch.cat([out[:-1], rounding(q[-1:], k[:-1], v[:-1], window, scale)])


def other_scale(q, k, v, window, scale):
    return rounding(q, k, v, window, 1.1 * scale)


def no_window(q, k, v, window, scale):
    return rounding(q, k, v, None, scale)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("rows", [3, 65])
def test_keys_in_8_bits_are_attended_to_as_floats_are(window, rows):
    random = torch.Generator().manual_seed(2)
    q = torch.randn(rows, 4, 8, generator=random)
    stored = quantise(torch.randn(2, 90, 2, 8, generator=random))
    floats = dequantise(stored, torch.float32)
    actual = rounding(q, *seen_floats(q, *stored, window), window, 0.3)
    torch.testing.assert_close(actual, causal_attention(q, *floats, window, 0.3))


@pytest.mark.sample(4)
@pytest.mark.parametrize("attend", [rounding, other_scale, no_window, one_row_short])
@pytest.mark.parametrize("shape", [(32, 8, 128), (9, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_that_round_pass_and_wrong_ones_do_not(attend, shape, dtype):
    heads, kv_heads, head_dim = shape
    shapes = Shapes(heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden_size=32)
    difference = kernels_module.attention_difference(attend, torch.device("cpu"), dtype, shapes)
    if attend is rounding:
        assert difference < kernels_module.TOLERANCE / 3
    else:
        assert difference > kernels_module.TOLERANCE


@pytest.mark.parametrize(
    ("attend", "reason"),
    [(rounding, ""), (no_window, "differ by"), (lambda *_: 1 / 0, "division by zero")],
)
def test_kernels_are_checked_before_they_are_used(monkeypatch, attend, reason):
    difference = kernels_module.attention_difference
    monkeypatch.setattr(kernels_module, "flash_attention", attend)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        kernels_module,
        "attention_difference",
        lambda attend, device, *shape: difference(attend, torch.device("cpu"), *shape),
    )

    shapes = Shapes(heads=4, kv_heads=2, head_dim=8, hidden_size=32)
    found, why = kernels_module.load_flash_attention(torch.device("cuda"), torch.bfloat16, shapes)
    assert (found is None) == bool(reason)
    assert reason in why
