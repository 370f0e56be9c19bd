"""Attention of prompts: FlashAttention where it can be used, and the operation for trees.

FlashAttention is checked with that operation. It has neither soft-capped scores nor attention
sinks, and takes no keys in 8 bits.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

from treeflash.errors import first_line, is_out_of_memory
from treeflash_cuda.cache import decoded
from treeflash_cuda.operations import Numbers, Operations, VisibleKeys

TOLERANCE = 0.01
"""Root mean square error of a kernel's outputs in standard deviations. Fused kernels round the
softmax to the dtype before they multiply it by the values: an error of 0.002 in bfloat16."""
MAX_QUERIES = 512
"""Rows of a prompt that the operation for trees computes at once, which limits its memory."""
MAX_ENCODED_QUERIES = 64
"""Rows of a prompt that read keys in 8 bits as they are stored. Floats cost a pass over all keys,
whatever the number of rows is; with more rows the products take longer than that pass, and
FlashAttention is faster at these. The limit is a guess: no GPU has measured it."""
MIN_CAPABILITY = 8, 0
"""FlashAttention needs an Ampere GPU."""


class Kernels(Protocol):
    """Attention of prompts."""

    def causal(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, **options: Any
    ) -> Tensor:
        """Attend from the last n positions to the whole sequence: (n, heads, head_dim).

        q is (n, heads, head_dim); k and v are (m, kv_heads, head_dim) of all positions, as the
        cache stores them. Each position sees `window` positions, itself included; None for all
        before it. `treeflash_cuda.operations.tree_attention` explains the options `softcap` and
        `sinks`.
        """


class ChunkKernels:
    """The operation for trees, in which a prompt is a tree without branches."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations

    def causal(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, **options: Any
    ) -> Tensor:
        outputs, length = [], len(k) - len(q)
        for part in q.split(MAX_QUERIES):
            end = length + len(part)
            positions = torch.arange(length, end, dtype=torch.int32, device=q.device)
            keys = VisibleKeys.of_chunks(
                torch.zeros_like(positions[:1]), positions[:1], positions[None]
            )
            output = self.operations.tree_attention(
                *(part, k.transpose(0, 1), v.transpose(0, 1)),
                keys if window is None else keys.within(window),
                max_length=end,
                scale=scale,
                **options,
            )
            outputs.append(output)
            length = end
        return torch.cat(outputs)


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

    def causal(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, **options: Any
    ) -> Tensor:
        assert all(option is None for option in options.values())
        # 0 and the length, made on the device: nothing is uploaded.
        queries, keys = (
            torch.arange(0, len(x) + 1, len(x), dtype=torch.int32, device=q.device) for x in (q, k)
        )
        sizes, sides = (queries, keys, len(q), len(k)), (-1 if window is None else window - 1, 0)
        return self.varlen(q, k, v, *sizes, scale=scale, window_size=sides)


class EncodedKernels:
    """FlashAttention over keys and values in 8 bits.

    Few rows attend by the operation for trees, which reads the 8 bits. For more rows the columns
    that they see become floats first, one layer at a time.
    """

    def __init__(self, few: Kernels, many: Kernels) -> None:
        self.few = few  # takes 8 bits
        self.many = many  # takes floats

    def causal(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, **options: Any
    ) -> Tensor:
        if len(q) <= MAX_ENCODED_QUERIES:
            return self.few.causal(q, k, v, window, scale, **options)
        if window is not None:  # the first row's
            unseen = max(len(k) - len(q) + 1 - window, 0)
            k, v = k[unseen:], v[unseen:]
        k, v = (decoded(x, q.dtype) for x in (k, v))
        return self.many.causal(q, k, v, window, scale, **options)


def flash_kernels(
    device: torch.device, dtype: torch.dtype, config: Any
) -> tuple[FlashKernels | None, str]:
    """Load FlashAttention's kernels, or None if their results differ from plain products.

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
        return None, first_line(error)
    if not difference <= TOLERANCE:
        return None, f"FlashAttention's results differ by {difference:.1%}"
    return kernels, ""


def _difference(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int
) -> float:
    """Return the root mean square error of the kernels on random numbers, in standard deviations.

    Of several windows the largest one.
    """
    numbers, columns, rows, scale = Numbers(device, dtype), 600, 40, size**-0.5
    k, v = numbers.draw(2, kv_heads, columns, size).transpose(1, 2)  # strided as in a cache
    q = numbers.draw(rows, heads, size)
    errors = []
    for window in (None, 100):
        actual, expected = (
            part.causal(q, k, v, window, scale).float()
            for part in (kernels, ChunkKernels(Operations()))
        )
        errors.append((actual - expected).square().mean().sqrt() / expected.std())
    return float(torch.stack(errors).max())
