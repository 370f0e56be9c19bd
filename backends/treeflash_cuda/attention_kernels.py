"""Kernels for parts of attention: plain products, and FlashAttention where it can be used."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from treeflash.errors import is_out_of_memory

State: TypeAlias = tuple[Tensor, Tensor]
"""(..., n, head_dim) outputs over a part of the keys, and (..., n) log-sum-exps of their scores,
float32 nats, infinite if there is no key."""

TOLERANCE = 0.02
"""Of a kernel's outputs, as a share of their standard deviation; bfloat16 rounds to 0.004."""
LEAST_CAPABILITY = 8, 0
"""FlashAttention needs an Ampere GPU."""


@dataclass(frozen=True, eq=False)
class Ranges:
    """The columns that each of b groups of queries sees.

    Attributes:
        first: (b,) int32.
        used: (b,) int32, how many from there on; may be 0.
    """

    first: Tensor
    used: Tensor


def merge(prefix: State, block: State) -> Tensor:
    """(..., n, head_dim) attention over both parts; the second one must not be empty."""
    out, lse = block
    empty = prefix[1].isinf()
    share = torch.sigmoid(prefix[1].masked_fill(empty, -torch.inf) - lse)[..., None]
    return torch.lerp(out.float(), prefix[0].float(), share).to(out.dtype)


class Kernels(Protocol):
    """The parts of attention."""

    def shared(self, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, scale: float) -> State:
        """Queries over ranges of columns, without a mask.

        Args:
            q: (b, kv_heads, n, head_dim); those of a group see the same columns.
            k: (m, kv_heads, head_dim), with any strides but the last.
            v: (m, kv_heads, head_dim).
            ranges: of the b groups.
            scale: factor on the scores.
        """

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> State:
        """A few queries over a few keys.

        Args:
            q: (b, kv_heads, n, head_dim).
            k: (b, kv_heads, m, head_dim).
            v: (b, kv_heads, m, head_dim).
            mask: (b, 1, n, m) additive, with aligned rows; every query sees a key.
            scale: factor on the scores.
        """

    def causal(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """(n, heads, head_dim) of the last n positions of a text over all that it sees.

        Args:
            q: (n, heads, head_dim).
            k: (m, kv_heads, head_dim) of all positions.
            v: (m, kv_heads, head_dim).
            window: positions that each one sees, itself included; None for all before it.
            scale: factor on the scores.
        """


class PlainKernels:
    """Products in float32: what the kernels of a GPU are checked against."""

    def shared(self, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, scale: float) -> State:
        """See `Kernels.shared`."""
        columns = torch.arange(len(k), device=k.device)
        first, last = ranges.first[:, None], (ranges.first + ranges.used)[:, None]
        visible = (columns >= first) & (columns < last)
        v = v.masked_fill(~visible.any(0)[:, None, None], 0)  # unused memory may hold NaN
        return _products(q, k.transpose(0, 1), v.transpose(0, 1), visible[:, None, None], scale)

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> State:
        """See `Kernels.masked`."""
        return _products(q, k, v, mask == 0, scale)

    def causal(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """See `Kernels.causal`."""
        n, m = len(q), len(k)
        columns = torch.arange(m, device=q.device)
        distance = columns[m - n :, None] - columns
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        queries = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)
        keys, values = k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None]
        out, _ = _products(queries, keys, values, visible, scale)
        return out.permute(2, 0, 1, 3).flatten(1, 2)


def _products(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> State:
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0)[..., None])
    return (weights @ v.float()).to(q.dtype), lse


class FlashKernels:
    """FlashAttention through PyTorch, in half precision on a CUDA device."""

    def __init__(self) -> None:
        """Import what only recent versions of PyTorch have.

        Raises:
            ImportError: this one has no `varlen_attn`, or lacks arguments of it.
        """
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        needed = {"seqused_k", "enable_gqa", "num_splits", "window_size", "return_aux"}
        if missing := needed - set(inspect.signature(varlen_attn).parameters):
            raise ImportError(f"torch.nn.attention.varlen.varlen_attn has no {min(missing)}")
        self.varlen, self.log_sum_exp = varlen_attn, AuxRequest(lse=True)

    def shared(self, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, scale: float) -> State:
        """See `Kernels.shared`.

        A group's queries are passed as heads of one query that share a key head: so FlashAttention
        reads each key once for all of them, and splits the keys between processors, which it does
        for single queries only.
        """
        b, kv_heads, n, head_dim = q.shape
        end = ranges.first[-1:] + ranges.used[-1:]
        out, lse = self.varlen(
            q.reshape(b, kv_heads * n, head_dim),
            k,
            v,
            torch.arange(b + 1, dtype=torch.int32, device=q.device),
            torch.cat([ranges.first, end]),
            1,
            len(k),
            seqused_k=ranges.used,
            scale=scale,
            enable_gqa=True,
            num_splits=0,  # as many as the kernel likes; cuDNN's kernels do not take the argument
            return_aux=self.log_sum_exp,
        )
        return out.view(b, kv_heads, n, head_dim), lse.view(kv_heads, n, b).permute(2, 0, 1)

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> State:
        """See `Kernels.masked`."""
        n, m = q.shape[2], k.shape[2]
        bias = mask.expand(*q.shape[:2], n, m)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, scale=scale
        )
        return out, lse[..., :n]  # the kernel pads it

    def causal(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """See `Kernels.causal`."""
        # 0 and the length, made on the device: nothing is uploaded.
        queries, keys = (
            torch.arange(0, len(x) + 1, len(x), dtype=torch.int32, device=q.device) for x in (q, k)
        )
        out: Tensor = self.varlen(
            q,
            k,
            v,
            queries,
            keys,
            len(q),
            len(k),
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
            num_splits=0,
        )
        return out


def flash_kernels(
    device: torch.device, dtype: torch.dtype, config: Any
) -> tuple[FlashKernels | None, str]:
    """FlashAttention's kernels, if they give what plain products do.

    Args:
        device: of the model.
        dtype: of the model.
        config: transformers' configuration of the model.

    Returns:
        None for a device or dtype that they do not support, or if they cannot be used; and in the
        latter case why.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return None, ""
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
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
        return None, f"their results differ by {difference:.1%}"
    return kernels, ""


def _difference(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int
) -> float:
    """The largest error of the kernels on random numbers, in standard deviations."""
    plain = PlainKernels()
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    groups, columns, nodes, scale = heads // kv_heads, 600, 5, size**-0.5
    stored = numbers(2, kv_heads, columns, size)
    k, v = stored.transpose(1, 2)  # strided as the storage of a text
    ranges = Ranges(
        torch.tensor([7, 0, 300], dtype=torch.int32, device=device),
        torch.tensor([500, 0, 300], dtype=torch.int32, device=device),
    )
    q = numbers(3, kv_heads, groups * nodes, size)
    own = numbers(2, 3, kv_heads, nodes, size)
    mask = torch.zeros(3, 1, groups * nodes, 8, dtype=dtype, device=device)[..., :nodes]
    mask[..., 1:] = mask[..., 1:].masked_fill(numbers(groups * nodes, nodes - 1) < 0, -torch.inf)
    sequence = numbers(nodes, heads, size)
    found = []
    for part in (kernels, plain):
        states = part.shared(q, k, v, ranges, scale), part.masked(q, *own, mask, scale)
        causal = [part.causal(sequence, k, v, window, scale) for window in (None, 100)]
        found.append(torch.cat([x.float().flatten() for x in (merge(*states), *causal)]))
    actual, expected = found
    return float((actual - expected).abs().max() / expected.std())
