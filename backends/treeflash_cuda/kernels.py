"""FlashAttention for prompts, where it can be used, and the products that it is checked with."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

from treeflash.errors import is_out_of_memory

TOLERANCE = 0.01
"""Root mean square error of a kernel's outputs in standard deviations. Fused kernels round the
softmax to the dtype before they multiply it by the values: an error of 0.002 in bfloat16."""
MIN_CAPABILITY = 8, 0
"""FlashAttention needs an Ampere GPU."""


class Kernels(Protocol):
    """Attention of prompts."""

    def causal(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """(n, heads, head_dim) of the last n positions of a sequence over the whole sequence.

        q is (n, heads, head_dim); k and v are (m, kv_heads, head_dim) of all positions. Each
        position sees `window` positions, itself included; None for all before it.
        """


class PlainKernels:
    """Products in float32, with which the kernels of a GPU are compared."""

    def causal(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        columns = torch.arange(len(k), device=q.device)
        distance = columns[len(k) - len(q) :, None] - columns
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        queries = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).float()
        keys, values = (x.transpose(0, 1)[:, None].float() for x in (k, v))
        scores = (queries @ keys.transpose(-1, -2)) * scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return self.weighted(weights, values, q.dtype).permute(2, 0, 1, 3).flatten(1, 2)

    def weighted(self, weights: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The outputs in a dtype, from float32 weights and values."""
        return (weights @ values).to(dtype)


class FlashKernels:
    """FlashAttention through PyTorch, in half precision on a CUDA device.

    Raises:
        ImportError: this version of PyTorch has no `varlen_attn`, or one with fewer arguments.
    """

    def __init__(self) -> None:
        from torch.nn.attention.varlen import varlen_attn

        needed = {"enable_gqa", "num_splits", "window_size"}
        if missing := needed - set(inspect.signature(varlen_attn).parameters):
            raise ImportError(f"torch.nn.attention.varlen.varlen_attn has no {min(missing)}")
        # As many splits as the kernel likes; cuDNN's kernels do not take the argument.
        self.varlen: Any = functools.partial(varlen_attn, enable_gqa=True, num_splits=0)

    def causal(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        # 0 and the length, made on the device: nothing is uploaded.
        queries, keys = (
            torch.arange(0, len(x) + 1, len(x), dtype=torch.int32, device=q.device) for x in (q, k)
        )
        sizes, sides = (queries, keys, len(q), len(k)), (-1 if window is None else window - 1, 0)
        return self.varlen(q, k, v, *sizes, scale=scale, window_size=sides)


def flash_kernels(
    device: torch.device, dtype: torch.dtype, config: Any
) -> tuple[FlashKernels | None, str]:
    """FlashAttention's kernels for a model, or None if their results differ from plain products.

    The second result is the reason if they fail although they support the device and the dtype.
    """
    on_cuda = device.type == "cuda" and dtype != torch.float32
    if not on_cuda or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return None, ""
    heads, hidden_size = config.num_attention_heads, config.hidden_size
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden_size // heads
    try:
        kernels = FlashKernels()
        difference = _difference(kernels, device, dtype, heads, kv_heads, head_dim)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None, str(error).partition("\n")[0]
    if not difference <= TOLERANCE:
        return None, f"FlashAttention's results differ by {difference:.1%}"
    return kernels, ""


def _difference(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int
) -> float:
    """The root mean square error of the kernels on random numbers, in standard deviations.

    Of several windows the largest one.
    """
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    columns, rows, scale = 600, 40, size**-0.5
    k, v = numbers(2, kv_heads, columns, size).transpose(1, 2)  # strided as in a cache
    q = numbers(rows, heads, size)
    errors = []
    for window in (None, 100):
        actual, expected = (
            part.causal(q, k, v, window, scale).float() for part in (kernels, PlainKernels())
        )
        errors.append((actual - expected).square().mean().sqrt() / expected.std())
    return float(torch.stack(errors).max())
