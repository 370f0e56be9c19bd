"""The operations of a forward pass that have Triton kernels, and their PyTorch definitions.

A forward pass calls `Operations`, whose members are the functions below or Triton kernels with the
same arguments. The functions define the results: `gpu.kernel_loading` compares each kernel with its
function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treeflash_cuda.cache import decoded, quantise
from treeflash_cuda.numerics import divide_by_temperature, gumbel
from treeflash_cuda.quantised_weights import QuantisedWeight
from treeflash_cuda.recurrence import commit_recurrence, convolve_paths, tree_recurrence
from treeflash_cuda.visible_keys import VisibleKeys

ROWS_AT_ONCE = 16
"""Rows that PyTorch's definitions of attention and sampling compute at once, which limits their
memory."""

KERNEL = "used (Triton)"
"""The verdict on an operation whose kernel is used."""

GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
"""Activations of gates, by transformers' names."""


def tree_attention(
    q: Tensor,  # (rows, heads, head_dim)
    k: Tensor,  # (kv_heads, columns, head_dim) of the cache, or quantised
    v: Tensor,  # (kv_heads, columns, head_dim) of the cache, or quantised
    keys: VisibleKeys,
    *,
    scale: float,  # factor on the scores
    softcap: float | None = None,  # scores become softcap * tanh(score / softcap)
    sinks: Tensor | None = None,  # (heads,) scores of a key per head whose value is zero
) -> Tensor:
    """Return (rows, heads, head_dim) attention of all rows, contiguous. Every row sees a key."""
    shared = keys.shared[:, None]
    positions = torch.arange(most_shared(keys), device=q.device)
    later = torch.arange(keys.paths.shape[1], device=q.device) + shared
    offsets = torch.cat([positions.expand(len(shared), -1), shared + keys.paths], 1)
    all_columns = keys.columns(offsets)
    all_visible = torch.cat([keys.sees(positions) & (positions < shared), keys.sees(later)], 1)
    if sinks is not None:
        sinks = sinks.float().view(len(k), 1, -1, 1)
    outputs = []
    for queries, columns, visible in zip(
        *(x.split(ROWS_AT_ONCE) for x in (q, all_columns, all_visible)), strict=True
    ):
        index = columns.masked_fill(~visible, 0)
        # Unused memory may hold NaN: (kv_heads, rows, m, head_dim) without it.
        unused = ~visible[None, :, :, None]
        keys_, values = (
            decoded(x[:, index], q.dtype).float().masked_fill(unused, 0) for x in (k, v)
        )
        by_head = queries.unflatten(1, (len(k), -1)).transpose(0, 1).float()
        scores = by_head @ keys_.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(~visible[None, :, None], -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
        weights = scores.softmax(-1)[..., : index.shape[1]]
        outputs.append((weights @ values).transpose(0, 1).flatten(1, 2))
    return torch.cat(outputs).to(q.dtype)


def most_shared(keys: VisibleKeys) -> int:
    """Read how many positions the rows of a sequence share at most."""
    return int(keys.shared.max())


def rms_norm(
    x: Tensor,  # (..., size)
    weight: Tensor,  # (size,); `1 + weight` for models that add 1 to it
    eps: float,
    residual: Tensor | None = None,  # (..., size), added first
) -> tuple[Tensor, Tensor]:
    """Return the (..., size) normalised sum, and the sum itself, in the dtype of x."""
    if residual is not None:
        x = x + residual
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype), x


def rotate_and_store(
    q: Tensor,  # (n, heads, head_dim)
    k: Tensor,  # (n, kv_heads, head_dim)
    v: Tensor,  # (n, kv_heads, head_dim)
    cos: Tensor,  # (n, rotary_dim) of the rows' positions; the halves are equal
    sin: Tensor,  # (n, rotary_dim)
    k_cache: Tensor,  # (kv_heads, columns, head_dim), or quantised; written in place
    v_cache: Tensor,  # (kv_heads, columns, head_dim), or quantised; written in place
    slots: Tensor,  # (n,) int64 or int32 column of each row
    *,
    norms: tuple[Tensor, Tensor] | None = None,  # (head_dim,) RMSNorm weights of queries and keys
    eps: float = 0.0,  # the norms' epsilon
) -> Tensor:
    """Rotate queries and keys; returns (n, heads, head_dim) queries, and writes keys and values.

    Element i is paired with i + rotary_dim / 2; elements from rotary_dim on are not rotated.
    Several rows may have the same column if their keys and values are equal.
    """
    if norms is not None:
        q, k = (rms_norm(x, weight, eps)[0] for x, weight in zip((q, k), norms, strict=True))
    q, k = (_rotated(x, cos[:, None], sin[:, None]) for x in (q, k))
    for cache, new in ((k_cache, k), (v_cache, v)):
        stored = quantise(new) if cache.dtype == torch.int8 else new
        cache.index_copy_(1, slots.long(), stored.transpose(0, 1))
    return q


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    part = x[..., :size].float()
    first, second = part.chunk(2, -1)
    turned = part * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned.to(x.dtype), x[..., size:]], -1)


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Return the (..., size) activation(gate) * up, contiguous; see `GATES`."""
    return GATES[activation](gate) * up


def grouped_linear(
    x: Tensor,  # (rows, size), the rows of group 0 first
    weight: Tensor,  # (groups, width, size), with any strides
    ends: Tensor,  # (groups,) int32 row after each group's last one
    bias: Tensor | None = None,  # (groups, width)
) -> Tensor:
    """Multiply rows with their group's weight: (rows, width); zeros after the last group."""
    rows = torch.arange(len(x), dtype=ends.dtype, device=x.device)
    group = torch.searchsorted(ends, rows, right=True)
    known = group.clamp(max=len(ends) - 1)
    result = torch.bmm(weight[known].float(), x.float()[:, :, None])[..., 0]
    if bias is not None:
        result = result + bias[known].float()
    return result.masked_fill((group == len(ends))[:, None], 0).to(x.dtype)


def quantised_linear(
    x: Tensor,  # (..., size)
    weight: QuantisedWeight,  # (width, size), with scales in the dtype of x
    bias: Tensor | None = None,  # (width,)
) -> Tensor:
    """Multiply (..., size) rows with a quantised weight: (..., width)."""
    return F.linear(x, weight.dequantised(), bias)


def sample_rows(
    logits: Tensor,  # (n, vocab)
    keys: Tensor,  # (n, 2) int32 of the noise
    settings: Tensor,  # (n, 4) float32 temperature (0 is greedy), top-k (0 is off), top-p, min-p
) -> Tensor:
    """Sample the (n,) int32 tokens, as `treeflash.decoding.sampling.sample_tokens` chooses them.

    It is -1 where a row's largest logit is not finite.
    """
    parts = zip(*(x.split(ROWS_AT_ONCE) for x in (logits, keys, settings)), strict=True)
    return torch.cat([_sampled(*part) for part in parts])


def _sampled(logits: Tensor, keys: Tensor, settings: Tensor) -> Tensor:
    vocab, (temperature, top_k, top_p, min_p) = logits.shape[1], settings[:, :, None].unbind(1)
    best, greedy = logits.float().amax(-1, keepdim=True), temperature == 0
    scores = (logits.float() - best) / temperature.masked_fill(greedy, 1)
    ranked = scores.sort(descending=True).values
    k = top_k.masked_fill(top_k <= 0, vocab).clamp(max=vocab).long()
    edge = ranked.gather(1, k - 1)
    mass = ranked.exp().masked_fill(ranked < edge, 0).double()
    before = mass.cumsum(-1) - mass
    inside = (before < top_p * mass.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    edge = torch.maximum(edge, ranked.gather(1, inside.clamp(min=1) - 1))
    kept = (scores >= edge) & (scores.exp() >= min_p) | greedy
    noisy = scores + gumbel(keys, vocab).masked_fill(greedy, 0)
    tokens = noisy.masked_fill(~kept, -torch.inf).argmax(-1)
    return torch.where(best[:, 0].isfinite(), tokens, -1).int()


def draft_noise(
    noise: Tensor,  # (n, 3) int32: two keys, and the bits of a float32 scale
    tokens: Tensor | int,  # (groups, v) tokens of equal parts of the rows; or v, for the first v
) -> Tensor:
    """Return the (n, v) float32 noise of tokens, times the scale of each row."""
    if isinstance(tokens, Tensor):
        tokens = tokens.repeat_interleave(len(noise) // len(tokens), 0)
    return gumbel(noise[:, :2], tokens) * noise[:, 2:].view(torch.float32)


def noisy_log_probs(
    logits: Tensor,  # (n, v)
    noise: Tensor,  # (n, 3), as of `draft_noise`, which is added to the logits; or (0, 3) for none
    temperature: float,
    ids: Tensor | None = None,  # (v,) tokens of the logits; None for the first v
) -> Tensor:
    """Return the (n, v) float32 log probabilities of noisy logits at a temperature."""
    if len(noise):
        tokens = logits.shape[1] if ids is None else ids[None]
        logits = logits + draft_noise(noise, tokens)
    return divide_by_temperature(logits, temperature).log_softmax(-1)


def move_columns(
    storage: Tensor,  # (layers, 2, kv_heads, columns, width) keys and values, changed in place
    sources: Tensor,  # (n,) int32 columns
    targets: Tensor,  # (n,) int32 columns
    ends: Tensor,  # (sequences,) int32 where the columns of each sequence end among these
) -> None:
    """Move columns in all layers. No target is the source of a later column."""
    storage.index_copy_(3, targets.long(), storage.index_select(3, sources.long()))


@dataclass(frozen=True)
class Operations:
    """One implementation of each operation, with the arguments of the function above."""

    tree_attention: Callable[..., Tensor] = tree_attention
    rms_norm: Callable[..., tuple[Tensor, Tensor]] = rms_norm
    rotate_and_store: Callable[..., Tensor] = rotate_and_store
    gated: Callable[..., Tensor] = gated
    grouped_linear: Callable[..., Tensor] = grouped_linear
    sample_rows: Callable[..., Tensor] = sample_rows
    tree_recurrence: Callable[..., tuple[Tensor, Tensor, Tensor]] = tree_recurrence
    commit_recurrence: Callable[..., None] = commit_recurrence
    convolve_paths: Callable[..., tuple[Tensor, Tensor]] = convolve_paths
    move_columns: Callable[..., None] = move_columns
    quantised_linear: Callable[..., Tensor] = quantised_linear
    draft_noise: Callable[..., Tensor] = draft_noise
    noisy_log_probs: Callable[..., Tensor] = noisy_log_probs
    # An operation that has a kernel and runs in PyTorch has the reason here, by its name.
    reasons: Mapping[str, str] = field(default_factory=dict)
    # What reports add to that: the largest difference of each kernel that ran, as `_worst_row`
    # measures it, and the whole error of each that did not.
    differences: Mapping[str, float] = field(default_factory=dict, compare=False)
    errors: Mapping[str, str] = field(default_factory=dict, compare=False)
    shapes: Shapes | None = None  # the sizes that kernels were loaded for

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """A line for each reason why operations that have a kernel run in PyTorch."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(name)
        return tuple(
            f"{', '.join(names)} {'runs' if len(names) == 1 else 'run'} in PyTorch: {reason}"
            for reason, names in by_reason.items()
        )

    @property
    def verdicts(self) -> dict[str, str]:
        """What runs each operation that a model uses: the kernel, or why it is not used."""
        names = (x.name for x in fields(self) if callable(x.default))
        return dict.fromkeys(filter(self.has_kernel, names), KERNEL) | dict(self.reasons)

    @property
    def runs_trees(self) -> bool:
        """Whether attention has its kernel; PyTorch's definition is for comparisons alone."""
        return "tree_attention" not in self.reasons

    def without(self, reasons: Mapping[str, str]) -> Operations:
        """Return operations that also run in PyTorch where there are other reasons, by name."""
        added = {name: reason for name, reason in reasons.items() if name not in self.reasons}
        functions: dict[str, Any] = {name: getattr(PYTORCH, name) for name in added}
        return replace(self, **functions, reasons={**self.reasons, **added})

    def has_kernel(self, name: str) -> bool:
        """Return whether an operation is not PyTorch's."""
        return getattr(self, name) is not getattr(PYTORCH, name)


PYTORCH = Operations()
"""The operations without any kernel."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The sizes of a model that kernels are compiled for and checked with."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    softcap: float | None = None  # the softcap of the layers' scores
    sinks: bool = False  # whether layers have attention sinks
    quantised: bool = False  # whether keys and values are stored in 8 bits
    has_own_layers: bool = True  # whether layers are ours, whose norms and gates are operations
    experts: bool = False  # whether layers have experts
    draft_bits: tuple[int, ...] = ()  # the bits of weights of drafters that are quantised
    # The heads, key_dim and value_dim of recurrent layers, and whether their states are transposed.
    recurrent: tuple[tuple[int, int, int, bool], ...] = ()
    # The channels and the kernel of short convolutions.
    convolutions: tuple[tuple[int, int], ...] = ()
