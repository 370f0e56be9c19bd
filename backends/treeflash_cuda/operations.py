"""The operations of a forward pass that have kernels of their own, and their PyTorch definitions.

A forward pass calls `Operations`, whose members are the functions below or Triton kernels with the
same arguments. The functions define the results: at load, each kernel is compared with its function
and replaced by it if they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from treeflash.errors import first_line, is_out_of_memory
from treeflash_cuda.cache import decoded, quantise
from treeflash_cuda.numerics import gumbel

TOLERANCES = {torch.bfloat16: 0.01, torch.float16: 0.01, torch.float32: 1e-5}
"""Root mean square error of a kernel's rows in standard deviations. In bfloat16, rounding alone
gives 0.003; a row that sees another row's key, or misses one, differs by more than 0.05."""

KERNEL = "Triton"
"""The verdict on an operation whose kernel is used."""

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, eq=False)
class VisibleKeys:
    """The keys that the rows of t sequences see, n rows each.

    A row sees the positions from `start` to `end`, and those before `sink`. Positions before
    `shared` are in consecutive columns of the cache and common to all rows of a sequence. A later
    position has another key for each branch of a draft tree: `paths` names its column.
    """

    first: Tensor  # (t,) int32 column of each sequence's position 0
    shared: Tensor  # (t,) int32 positions that are common to all rows
    start: Tensor  # (t, n) int32 first visible position
    end: Tensor  # (t, n) int32 position after the last visible one
    # (t, n, depths) int32 columns of the keys at positions `shared`, `shared` + 1, ..., counted
    # from column `first` + `shared`. There are at least `end` - `shared` of them.
    paths: Tensor
    sink: Tensor | None = None  # (t,) int32 positions that every row sees; None for none

    @classmethod
    def of_trees(
        cls, first: Tensor, length: Tensor, positions: Tensor, ancestors: Tensor
    ) -> VisibleKeys:
        """Let nodes see all (t,) committed positions, their ancestors, and themselves.

        The trees have (t, n) positions and (t, n, n) bool ancestors, which include the node itself
        and come before it. Node i is in column `first` + `length` + i.
        """
        end = positions.int() + 1
        return cls(first, length, torch.zeros_like(end), end, ancestor_paths(ancestors))

    @classmethod
    def of_chunks(cls, first: Tensor, length: Tensor, positions: Tensor) -> VisibleKeys:
        """Let rows at (t, n) consecutive positions after (t,) committed ones see what is before."""
        end = positions.int() + 1
        paths = end.new_zeros(*end.shape, 0)
        return cls(first, length + end.shape[1], torch.zeros_like(end), end, paths)

    def within(self, window: int) -> VisibleKeys:
        """Return what rows see that see the last `window` positions, their own included."""
        return replace(self, start=torch.maximum(self.start, self.end - window))


def ancestor_paths(ancestors: Tensor) -> Tensor:
    """Return (t, n, n) int32 rows of each node's ancestors by depth, from (t, n, n) bool ancestors.

    Entries beyond a node's own depth are 0.
    """
    n = ancestors.shape[-1]
    rank = ancestors.cumsum(-1) - 1
    rows = torch.arange(n, dtype=torch.int32, device=ancestors.device).expand_as(ancestors)
    paths = rows.new_zeros(*ancestors.shape[:-1], n + 1)
    return paths.scatter_(-1, rank.masked_fill(~ancestors, n), rows)[..., :n]


def tree_attention(
    q: Tensor,  # (t * n, heads, head_dim), sequence by sequence
    k: Tensor,  # (kv_heads, columns, head_dim) of the cache, or quantised
    v: Tensor,  # (kv_heads, columns, head_dim) of the cache, or quantised
    keys: VisibleKeys,
    *,
    max_length: int,  # bound on `keys.shared`; fixes the shapes of the computation
    scale: float,  # factor on the scores
    softcap: float | None = None,  # scores become softcap * tanh(score / softcap)
    sinks: Tensor | None = None,  # (heads,) scores of a key per head whose value is zero
) -> Tensor:
    """Return (t * n, heads, head_dim) attention of all rows, contiguous. Every row sees a key."""
    (t, n), (kv_heads, columns, _) = keys.end.shape, k.shape
    device = q.device
    shared, first = keys.shared[:, None], keys.first[:, None]
    positions = torch.arange(max_length, device=device)
    # The common positions, and then the rows in the order of their columns.
    places = [first + positions, first + shared + torch.arange(n, device=device)]
    index = torch.cat(places, 1).clamp(max=columns - 1)
    visible = torch.cat([_sees(keys, positions) & (positions < shared[..., None]), _tree(keys)], 2)
    keys_, values = (decoded(x[:, index], q.dtype).transpose(0, 1).float() for x in (k, v))
    # Unused memory may hold NaN.
    used = visible.any(1)[:, None, :, None]
    keys_, values = keys_.masked_fill(~used, 0), values.masked_fill(~used, 0)
    queries = q.view(t, n, kv_heads, -1, q.shape[-1]).permute(0, 2, 3, 1, 4).float()
    scores = queries @ keys_[:, :, None].transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    if sinks is not None:
        column = sinks.float().view(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : index.shape[1]]
    out = (weights @ values[:, :, None]).permute(0, 3, 1, 2, 4)
    return out.reshape(q.shape).to(q.dtype)


def _sees(keys: VisibleKeys, positions: Tensor) -> Tensor:
    """Return the (t, n, m) whether rows see (m,) or (t, 1, m) positions."""
    start, end = keys.start[..., None], keys.end[..., None]
    visible = positions >= start
    if keys.sink is not None:
        visible = visible | (positions < keys.sink[:, None, None])
    return visible & (positions < end)


def _tree(keys: VisibleKeys) -> Tensor:
    """Return the (t, n, n) whether rows see the keys of rows."""
    *shape, depths = keys.paths.shape
    positions = keys.shared[:, None, None] + torch.arange(depths, device=keys.paths.device)
    index = keys.paths.long().masked_fill(~_sees(keys, positions), shape[1])
    visible = torch.zeros(*shape, shape[1] + 1, dtype=torch.bool, device=index.device)
    return visible.scatter_(2, index, True)[..., : shape[1]]


def rms_norm(
    x: Tensor,  # (..., size)
    weight: Tensor,  # (size,); with the 1 that some models add to it
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
    """Rotate (n, heads, head_dim) rotated queries, contiguous; writes the rows' keys and values.

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


def gated(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """Return the (..., size) activation(gate) * up, contiguous: SwiGLU, or Gemma's GeGLU."""
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return active * up


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


def sample_rows(
    logits: Tensor,  # (n, vocab)
    keys: Tensor,  # (n, 2) int32 of the noise
    settings: Tensor,  # (n, 4) float32 temperature (0 is greedy), top-k (0 is off), top-p, min-p
) -> Tensor:
    """Sample the (n,) int32 tokens, as `treeflash.decoding.sampling.sample_tokens` chooses them.

    It is -1 where a row's largest logit is not finite.
    """
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


@dataclass(frozen=True)
class Operations:
    """One implementation of each operation, with the arguments of the function above."""

    tree_attention: Callable[..., Tensor] = tree_attention
    rms_norm: Callable[..., tuple[Tensor, Tensor]] = rms_norm
    rotate_and_store: Callable[..., Tensor] = rotate_and_store
    gated: Callable[..., Tensor] = gated
    grouped_linear: Callable[..., Tensor] = grouped_linear
    sample_rows: Callable[..., Tensor] = sample_rows
    # Why an operation that has a kernel runs in PyTorch, by its name.
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """A line for each operation that has a kernel but runs in PyTorch."""
        return tuple(f"{name} runs in PyTorch: {reason}" for name, reason in self.reasons.items())

    @property
    def verdicts(self) -> dict[str, str]:
        """What runs each operation that a model uses: the kernel, or why it is not used."""
        return dict.fromkeys(filter(self.has_kernel, CHECKS), KERNEL) | dict(self.reasons)

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
    experts: bool = False  # whether layers have experts


def load_operations(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Operations:
    """Load a model's operations on a GPU: Triton kernels that pass their check, else PyTorch."""
    try:
        from treeflash_cuda.triton_kernels import attention, experts, layers, sampling
    except ImportError as error:
        return Operations(reasons=dict.fromkeys(CHECKS, str(error)))
    kernels = Operations(
        *(attention.tree_attention, layers.rms_norm, layers.rotate_and_store, layers.gated),
        *(experts.grouped_linear, sampling.sample_rows),
    )
    return checked(kernels, shapes, device, dtype)


def checked(
    kernels: Operations, shapes: Shapes, device: torch.device, dtype: torch.dtype
) -> Operations:
    """Return the kernels that agree with PyTorch, and PyTorch for the other operations."""
    chosen: dict[str, Any] = {}
    reasons = {}
    for name, compute in CHECKS.items():
        if name == "grouped_linear" and not shapes.experts:
            continue
        try:
            difference = max(
                _worst_row(actual, expected)
                for actual, expected in zip(
                    compute(kernels, Numbers(device, dtype), shapes),
                    compute(Operations(), Numbers(device, dtype), shapes),
                    strict=True,
                )
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reasons[name] = first_line(error)
        else:
            if difference <= TOLERANCES[dtype]:
                chosen[name] = getattr(kernels, name)
            else:
                reasons[name] = f"the kernel's results differ by {difference:.2%}"
    return Operations(**chosen, reasons=reasons)


def _worst_row(actual: Tensor, expected: Tensor) -> float:
    """Return the largest root mean square error of a row, as a share of the standard deviation."""
    error = (actual.float() - expected.float()).square().flatten(1).mean(1).amax().sqrt()
    return float(error / expected.float().std())


class Numbers:
    """Random numbers that are equal whenever they are drawn in the same order."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._random = torch.Generator().manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random).to(self.device, self.dtype)

    def integers(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


CHUNK = 18
"""Rows of a prompt in the check: more than the kernel multiplies at once, with any group size."""


def _check_attention(operations: Operations, numbers: Numbers, shapes: Shapes) -> list[Tensor]:
    """Check trees with and without a window, a prompt's tokens, and plain decoding's rows.

    Rows cross tiles and chunks.
    """
    lengths, parents, spare = (2, 61, 510), (-1, 0, 0, 1, 1, 2), 7
    n, depths = len(parents), numbers.integers([0, 1, 1, 2, 2, 2])
    ancestors = torch.eye(n, dtype=torch.bool)
    for node, parent in enumerate(parents[1:], 1):
        ancestors[node] |= ancestors[parent]
    length, first = numbers.integers(lengths), numbers.integers([spare, 20, 100])
    columns = 100 + max(lengths) + CHUNK
    cache = numbers.draw(2, shapes.kv_heads, columns, shapes.head_dim)
    k, v = quantise(cache) if shapes.quantised else cache
    tree = VisibleKeys.of_trees(
        first, length, length[:, None] + depths, ancestors.to(k.device).expand(len(lengths), n, n)
    )
    positions = torch.arange(CHUNK, dtype=torch.int32, device=k.device)
    chunk = VisibleKeys.of_chunks(first, length, length[:, None] + positions)
    single = VisibleKeys.of_chunks(first, length, length[:, None])
    sink = numbers.integers([3] * len(lengths))
    sinks = numbers.draw(shapes.heads) if shapes.sinks else None
    options = {"scale": shapes.head_dim**-0.5, "softcap": shapes.softcap, "sinks": sinks}
    return [
        operations.tree_attention(
            numbers.draw(keys.end.numel(), shapes.heads, shapes.head_dim),
            *(k, v, keys),
            max_length=1024,
            **options,
        )
        for keys in (tree, replace(tree.within(64), sink=sink), tree.within(2), chunk, single)
    ]


def _check_norm(operations: Operations, numbers: Numbers, shapes: Shapes) -> list[Tensor]:
    x, residual = numbers.draw(2, 5, shapes.hidden_size)
    weight = numbers.draw(shapes.hidden_size)
    parts = operations.rms_norm(x, weight, 1e-6), operations.rms_norm(x, weight, 1e-6, residual)
    return [part for pair in parts for part in pair]


def _check_rotation(operations: Operations, numbers: Numbers, shapes: Shapes) -> list[Tensor]:
    results = []
    n, slots = 3, numbers.integers([5, 0, 9])
    for rotary_dim in {shapes.head_dim, shapes.head_dim // 4 * 2}:
        for norm in (False, True):
            qkv = numbers.draw(n, shapes.heads + 2 * shapes.kv_heads, shapes.head_dim)
            q, k, v = qkv.split([shapes.heads, shapes.kv_heads, shapes.kv_heads], 1)
            angles = numbers.draw(n, rotary_dim // 2).repeat(1, 2)
            caches = numbers.draw(2, shapes.kv_heads, 10, shapes.head_dim)
            stored = quantise(caches) if shapes.quantised else caches
            weights = numbers.draw(2, shapes.head_dim)
            results += [
                operations.rotate_and_store(
                    *(q, k, v, angles.cos(), angles.sin(), stored[0], stored[1], slots),
                    norms=(weights[0], weights[1]) if norm else None,
                    eps=1e-6,
                ),
                decoded(stored, qkv.dtype).flatten(0, 1),
            ]
    return results


def _check_gate(operations: Operations, numbers: Numbers, shapes: Shapes) -> list[Tensor]:
    gate, up = numbers.draw(3, 2 * shapes.hidden_size).chunk(2, 1)
    return [operations.gated(gate, up, "silu"), operations.gated(gate, up, "gelu_tanh")]


def _check_experts(operations: Operations, numbers: Numbers, shapes: Shapes) -> list[Tensor]:
    """Check experts with few, many and no rows, both layouts, and rows of no expert."""
    groups, width = 3, 48
    weights = numbers.draw(groups, width, shapes.hidden_size)
    bias = numbers.draw(groups, width)
    results = []
    for ends in ([3, 3, 19], [70, 71, 140]):
        x = numbers.draw(ends[-1] + 2, shapes.hidden_size)
        for weight in (weights, weights.transpose(1, 2).contiguous().transpose(1, 2)):
            for biases in (None, bias):
                product = operations.grouped_linear(x, weight, numbers.integers(ends), biases)
                results.append(product / shapes.hidden_size**0.5)
    return results


SAMPLES = 8
"""Rows of each setting in the check of sampling."""


def _check_sampling(operations: Operations, numbers: Numbers, shapes: Shapes) -> list[Tensor]:
    """Check every filter alone and all together, greedy rows, and rows that are not finite.

    A setting has several rows, so that a filter decides some of them.
    """
    settings = [
        *([1, 0, 1, 0], [0.3, 0, 1, 0], [0, 0, 1, 0], [2, 2, 1, 0], [0.7, 0, 0.6, 0]),
        *([2, 0, 1, 0.3], [0.9, 50, 0.9, 0.01], [1.5, 0, 0, 0], [1, 0, 1, 0]),
    ]
    n = SAMPLES * len(settings)
    logits = 2 * numbers.draw(n, 700)
    logits[-1, 3] = torch.nan
    keys = numbers.integers([[977 * i, 61 - 7 * i] for i in range(n)])
    rows = torch.tensor(settings, dtype=torch.float32, device=logits.device)
    rows = rows.repeat_interleave(SAMPLES, 0)
    return [operations.sample_rows(x, keys, rows)[:, None] for x in (logits, logits.float())]


CHECKS: dict[str, Callable[[Operations, Numbers, Shapes], list[Tensor]]] = {
    "tree_attention": _check_attention,
    "rms_norm": _check_norm,
    "rotate_and_store": _check_rotation,
    "gated": _check_gate,
    "grouped_linear": _check_experts,
    "sample_rows": _check_sampling,
}
"""Results of each operation on random numbers, with rows first."""
