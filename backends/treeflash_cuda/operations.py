"""The operations of a forward pass that have Triton kernels, and their PyTorch definitions.

A forward pass calls `Operations`, whose members are the functions below or Triton kernels with the
same arguments. The functions define the results: at load, each kernel is compared with its function
and replaced by it if they differ.
"""

from __future__ import annotations

import functools
import itertools
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from treeflash.decoding.hybrid import convolution_windows
from treeflash.decoding.tree import DraftTree
from treeflash.errors import is_out_of_memory
from treeflash_cuda.cache import decoded, quantise
from treeflash_cuda.gpu.compilation import compiling_announced, reason_of
from treeflash_cuda.numerics import divide_by_temperature, gumbel
from treeflash_cuda.quantised_weights import GROUP, QuantisedWeight, quantise_weight
from treeflash_cuda.recurrence import (
    TreeNodes,
    commit_recurrence,
    convolve_paths,
    plan_nodes,
    tree_recurrence,
)
from treeflash_cuda.visible_keys import PAGE, RowPlan, VisibleKeys

LOGGER = logging.getLogger(__name__)

TOLERANCES = {torch.bfloat16: 0.01, torch.float16: 0.01, torch.float32: 1e-5}
"""Root mean square error of a kernel's rows in standard deviations. In bfloat16, rounding alone
gives 0.003; a row that sees another row's key, or misses one, differs by more than 0.05."""

ROWS_AT_ONCE = 16
"""Rows that PyTorch's definitions of attention and sampling compute at once, which limits their
memory."""

KERNEL = "used (Triton)"
"""The verdict on an operation whose kernel is used."""

Activation = Literal["silu", "gelu_tanh"]


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
        return dict.fromkeys(filter(self.has_kernel, CHECKS), KERNEL) | dict(self.reasons)

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


EXAMINED_STATES = (4, 128, 128, False), (4, 128, 64, True)
"""The states of gated delta nets and of Mamba-2, as `Shapes.recurrent`, for checks of a device."""
EXAMINED_CONVOLUTIONS = (600, 4), (64, 3)
"""As `Shapes.convolutions`, for checks of a device."""


def examined_shapes(head_dim: int, draft_bits: tuple[int, ...] = ()) -> Shapes:
    """Return the shapes of a target that uses every kernel, for checks of a device."""
    return Shapes(
        heads=8,
        kv_heads=2,
        head_dim=head_dim,
        hidden_size=8 * head_dim,
        experts=True,
        draft_bits=draft_bits,
        recurrent=EXAMINED_STATES,
        convolutions=EXAMINED_CONVOLUTIONS,
    )


NEEDS = {
    "rms_norm": "has_own_layers",
    "rotate_and_store": "has_own_layers",
    "gated": "has_own_layers",
    "grouped_linear": "experts",
    "quantised_linear": "draft_bits",
    "tree_recurrence": "recurrent",
    "commit_recurrence": "recurrent",
    "convolve_paths": "convolutions",
}
"""Operations that only some models use, and the member of `Shapes` that such models have."""


def used_operations(shapes: Shapes) -> list[str]:
    """Return the names of the operations that a model uses."""
    return [name for name in CHECKS if name not in NEEDS or getattr(shapes, NEEDS[name])]


def load_operations(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Operations:
    """Load a model's operations on a GPU: Triton kernels that pass their check, else PyTorch."""
    try:
        from treeflash_cuda.gpu.triton_kernels import (
            attention,
            convolution,
            experts,
            layers,
            moves,
            noise,
            products,
            recurrence,
            sampling,
        )
    except ImportError as error:  # PyTorch has no Triton on Windows
        reasons = dict.fromkeys(used_operations(shapes), str(error))
        return Operations(reasons=reasons, shapes=shapes)
    modules = attention, convolution, experts, layers, moves, noise, products, recurrence, sampling
    kernels: dict[str, Any] = {
        name: on_its_device(getattr(module, name))
        for module in modules
        for name in CHECKS
        if hasattr(module, name)
    }
    with compiling_announced():
        return checked(Operations(**kernels), shapes, device, dtype)


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function launch Triton kernels on the device of its first argument.

    Triton launches them on the current device. That is another one where a user has chosen
    `cuda:1`, or a target has layers on several devices.
    """

    @functools.wraps(launch)
    def launch_there(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(x):
            return launch(x, *args, **kwargs)

    return launch_there


def checked(
    kernels: Operations, shapes: Shapes, device: torch.device, dtype: torch.dtype
) -> Operations:
    """Return the kernels that agree with PyTorch, and PyTorch for the other operations."""
    chosen: dict[str, Any] = {}
    reasons, worst, errors = {}, {}, {}
    for name in filter(kernels.has_kernel, used_operations(shapes)):
        compute = CHECKS[name]
        try:
            results = (
                compute(operations, RandomInputs(device, dtype), shapes)
                for operations in (kernels, Operations())
            )
            differences, excess = [], None
            for pair in zip(*results, strict=True):
                differences.append(_worst_row(*pair))
                if not differences[-1] <= TOLERANCES[dtype]:  # NaN is an excess, too
                    excess = differences[-1]
                    break
        except Exception as error:
            if is_out_of_memory(error):
                raise
            LOGGER.info("%s has no kernel", name, exc_info=error)
            reasons[name] = reason_of(error)
            errors[name] = "".join(traceback.format_exception(error))
        else:
            worst[name] = max(differences) if excess is None else excess
            if excess is None:
                chosen[name] = getattr(kernels, name)
            else:
                reasons[name] = f"the kernel's results differ by {excess:.2%}"
    return Operations(**chosen, reasons=reasons, differences=worst, errors=errors, shapes=shapes)


def _worst_row(actual: Tensor, expected: Tensor) -> float:
    """Return the largest root mean square error of a row, as a share of the standard deviation."""
    error = (actual.float() - expected.float()).square().flatten(1).mean(1).amax().sqrt()
    return float(error / expected.float().std())


class RandomInputs:
    """Random numbers that are equal whenever they are drawn in the same order."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._random = torch.Generator().manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random).to(self.device, self.dtype)

    def integers(self, values: Any) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.int32, device=self.device)


CHECKED_CHUNK = 18
"""Rows of a prompt in the check: more than the kernel multiplies at once, with any group size."""


def _check_attention(
    operations: Operations, numbers: RandomInputs, shapes: Shapes
) -> Iterator[Tensor]:
    """Check trees with and without a window, a prompt's tokens, and plain decoding's rows.

    Rows cross tiles, pages and chunks.
    """
    lengths, tables, first = np.array([2, 61, 510]), [], 1
    for length in lengths:  # pages in the reverse order
        end = first - (-(length + CHECKED_CHUNK) // PAGE)
        tables.append(np.arange(end - 1, first - 1, -1))
        first = end
    cache = numbers.draw(2, shapes.kv_heads, first * PAGE, shapes.head_dim)
    k, v = quantise(cache) if shapes.quantised else cache
    groups = shapes.heads // shapes.kv_heads
    tree = DraftTree.from_parents(np.zeros(6, np.int32), np.array([-1, 0, 0, 1, 1, 2], np.int32))
    kinds: list[VisibleKeys] = []
    several: Sequence[Sequence[DraftTree | int]]
    several = [tree, 1, tree], [1, tree, CHECKED_CHUNK], [1, 1, 1]
    for rows in several:
        plan = RowPlan.of(tables, lengths, rows, groups)
        keys = VisibleKeys.of_rows(*map(numbers.integers, plan.arrays()))
        kinds += [keys, keys.within(2)]
    sink = torch.full_like(kinds[0].end, 3)
    kinds.append(replace(kinds[0].within(64), sink=sink))
    sinks = numbers.draw(shapes.heads) if shapes.sinks else None
    options = {"scale": shapes.head_dim**-0.5, "softcap": shapes.softcap, "sinks": sinks}
    for keys in kinds:
        query = numbers.draw(len(keys.end), shapes.heads, shapes.head_dim)
        yield operations.tree_attention(query, k, v, keys, **options)


def _check_norm(operations: Operations, numbers: RandomInputs, shapes: Shapes) -> Iterator[Tensor]:
    x, residual = numbers.draw(2, 5, shapes.hidden_size)
    weight = numbers.draw(shapes.hidden_size)
    yield from operations.rms_norm(x, weight, 1e-6)
    yield from operations.rms_norm(x, weight, 1e-6, residual)


def _check_rotation(
    operations: Operations, numbers: RandomInputs, shapes: Shapes
) -> Iterator[Tensor]:
    n, slots = 3, numbers.integers([5, 0, 9])
    for rotary_dim in {shapes.head_dim, shapes.head_dim // 4 * 2}:
        for norm in (False, True):
            qkv = numbers.draw(n, shapes.heads + 2 * shapes.kv_heads, shapes.head_dim)
            q, k, v = qkv.split([shapes.heads, shapes.kv_heads, shapes.kv_heads], 1)
            angles = numbers.draw(n, rotary_dim // 2).repeat(1, 2)
            caches = numbers.draw(2, shapes.kv_heads, 10, shapes.head_dim)
            stored = quantise(caches) if shapes.quantised else caches
            weights = numbers.draw(2, shapes.head_dim)
            yield operations.rotate_and_store(
                *(q, k, v, angles.cos(), angles.sin(), stored[0], stored[1], slots),
                norms=(weights[0], weights[1]) if norm else None,
                eps=1e-6,
            )
            yield decoded(stored, qkv.dtype).flatten(0, 1)


def _check_gate(operations: Operations, numbers: RandomInputs, shapes: Shapes) -> Iterator[Tensor]:
    gate, up = numbers.draw(3, 2 * shapes.hidden_size).chunk(2, 1)
    yield operations.gated(gate, up, "silu")
    yield operations.gated(gate, up, "gelu_tanh")


def _check_experts(
    operations: Operations, numbers: RandomInputs, shapes: Shapes
) -> Iterator[Tensor]:
    """Check experts with few, many and no rows, both layouts, and rows of no expert."""
    groups, width = 3, 48
    weights = numbers.draw(groups, width, shapes.hidden_size)
    bias = numbers.draw(groups, width)
    for ends in ([3, 3, 19], [70, 71, 140]):
        x = numbers.draw(ends[-1] + 2, shapes.hidden_size)
        for weight in (weights, weights.transpose(1, 2).contiguous().transpose(1, 2)):
            for biases in (None, bias):
                product = operations.grouped_linear(x, weight, numbers.integers(ends), biases)
                yield product / shapes.hidden_size**0.5


def _check_quantised(
    operations: Operations, numbers: RandomInputs, shapes: Shapes
) -> Iterator[Tensor]:
    """Check few and many rows, columns that do not fill a program, and sums in several parts."""
    for bits, (width, groups, n) in itertools.product(
        shapes.draft_bits, ((72, 2, 20), (8, 16, 1), (8, 2, 70))
    ):
        size = groups * GROUP
        weight = quantise_weight(numbers.draw(width, size), bits)
        x = numbers.draw(n, size) / size**0.5
        for bias in (None, numbers.draw(width)):
            yield operations.quantised_linear(x, weight, bias)


SAMPLES = 8
"""Rows of each setting in the check of sampling."""


def _check_sampling(
    operations: Operations, numbers: RandomInputs, shapes: Shapes
) -> Iterator[Tensor]:
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
    for dtype in {logits.dtype, torch.float32}:
        yield operations.sample_rows(logits.to(dtype), keys, rows)[:, None]


CHECKED_TREES = [
    DraftTree.from_parents(np.zeros(n, np.int32), np.array([-1, 0, 0, 1, 1, 2, 0, 6], np.int32)[:n])
    for n in (8, 3)
]
"""Trees of different sizes. The states of the first one are kept in two places."""


def _nodes_alone(x: Tensor) -> Tensor:
    """Return the rows of (trees, n, ...) that belong to nodes of `CHECKED_TREES`."""
    return torch.cat([rows[: len(tree)] for rows, tree in zip(x, CHECKED_TREES, strict=True)])


def _check_recurrence(
    operations: Operations, numbers: RandomInputs, shapes: Shapes
) -> Iterator[Tensor]:
    """Check the delta rule, and linear attention with other gates."""
    nodes = TreeNodes.of(*map(numbers.integers, plan_nodes(CHECKED_TREES, 2, 8)))
    for heads, key_dim, value_dim, transposed in shapes.recurrent:
        groups = heads // 2 if heads % 2 == 0 else heads
        states = numbers.draw(4, heads, value_dim, key_dim).float().mT
        states = states if transposed else states.contiguous()
        for delta, channels in ((True, 1), (False, key_dim)):
            q, k = numbers.draw(2, 2, 8, groups, key_dim)
            log_g = -numbers.draw(2, 8, heads, channels).float().abs()
            beta = numbers.draw(2, 8, heads).sigmoid() if delta else None
            out, written, keys = operations.tree_recurrence(
                *(q, k, numbers.draw(2, 8, heads, value_dim), log_g, beta),
                *(states, numbers.integers([3, 1]), nodes),
                normalise=True,
                scale=key_dim**-0.5,
            )
            # The other rows are copies of roots in a pass, and random here.
            yield from map(_nodes_alone, (out, written.transpose(1, 2), keys.transpose(1, 2)))


def _check_commit(
    operations: Operations, numbers: RandomInputs, shapes: Shapes
) -> Iterator[Tensor]:
    """Check paths of different lengths."""
    paths = numbers.integers([[1, 2, 1, 3, 0, 2, 4, 0], [0, 0, 3, 1, 3, 0, 0, 0]])
    for heads, key_dim, value_dim, transposed in shapes.recurrent:
        states = numbers.draw(4, 2, heads, value_dim, key_dim).float().mT
        states = states if transposed else states.contiguous()
        for channels in (1, key_dim):
            written, keys = (
                numbers.draw(2, 2, heads, 5, size).float() for size in (value_dim, key_dim)
            )
            log_g = -numbers.draw(2, 2, heads, 5, channels).float().abs()
            changed = states.clone()
            operations.commit_recurrence(written, keys, log_g, changed, paths)
            yield changed.flatten(0, 1)


def _check_convolution(
    operations: Operations, numbers: RandomInputs, shapes: Shapes
) -> Iterator[Tensor]:
    """Check convolutions with and without a bias and an activation."""
    for channels, kernel in shapes.convolutions:
        windows = [convolution_windows(tree.parents, kernel) for tree in CHECKED_TREES]
        windows[1] = np.resize(windows[1], windows[0].shape)
        rows, tails = numbers.draw(2, channels, 8).mT, numbers.draw(4, 2, channels, kernel - 1)
        slots, index = numbers.integers([3, 1]), numbers.integers(windows).long()
        weight, bias = numbers.draw(channels, kernel), numbers.draw(channels)
        for settings in itertools.product((None, bias), (None, "silu", "relu")):
            out, inputs = operations.convolve_paths(
                rows, tails[:, 1], slots, index, weight, *settings
            )
            yield _nodes_alone(out)
            yield inputs.flatten(0, 1)


def _check_moves(operations: Operations, numbers: RandomInputs, shapes: Shapes) -> Iterator[Tensor]:
    """Check columns that are targets after they were sources."""
    columns = numbers.draw(2, 2, shapes.kv_heads, 12, shapes.head_dim)
    stored = quantise(columns) if shapes.quantised else columns
    moves = [2, 4, 5, 9, 10], [1, 2, 4, 8, 9], [3, 5]
    operations.move_columns(stored, *map(numbers.integers, moves))
    yield decoded(stored, columns.dtype).flatten(0, 3)


def _drafted_noise(numbers: RandomInputs) -> Tensor:
    """Return the noise of four rows; the third has none."""
    scales = numbers.integers(np.array([1, 0.5, 0, 2], np.float32).view(np.int32))
    keys = numbers.integers([[977 * i, 61 - 7 * i] for i in range(4)])
    return torch.cat([keys, scales[:, None]], 1)


def _check_noise(operations: Operations, numbers: RandomInputs, shapes: Shapes) -> Iterator[Tensor]:
    """Check the noise of all tokens, and of the tokens of two groups."""
    for tokens in (700, numbers.integers([[5, 699, 31], [8, 5, 12]]).long()):
        yield operations.draft_noise(_drafted_noise(numbers), tokens)


def _check_log_probs(
    operations: Operations, numbers: RandomInputs, shapes: Shapes
) -> Iterator[Tensor]:
    """Check logits with and without noise, and tokens with other ids."""
    logits, noise = numbers.draw(4, 1500), _drafted_noise(numbers)
    ids = numbers.integers(np.arange(1500)[::-1] * 3)
    for settings in ((noise[:0], 1.0), (noise, 0.7), (noise, 1.0, ids)):
        yield operations.noisy_log_probs(logits, *settings)


CHECKS: dict[str, Callable[[Operations, RandomInputs, Shapes], Iterator[Tensor]]] = {
    "tree_attention": _check_attention,
    "rms_norm": _check_norm,
    "rotate_and_store": _check_rotation,
    "gated": _check_gate,
    "grouped_linear": _check_experts,
    "sample_rows": _check_sampling,
    "tree_recurrence": _check_recurrence,
    "commit_recurrence": _check_commit,
    "convolve_paths": _check_convolution,
    "move_columns": _check_moves,
    "quantised_linear": _check_quantised,
    "draft_noise": _check_noise,
    "noisy_log_probs": _check_log_probs,
}
"""Results of each operation on random numbers, with rows first."""
