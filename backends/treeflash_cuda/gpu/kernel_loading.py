"""Loading Triton kernels on a GPU: each is compared with its definition in `operations`.

Both compute random numbers with the sizes of a model. A kernel that differs, or fails, is replaced
by its definition, and `Operations` has the reason.
"""

from __future__ import annotations

import functools
import itertools
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treeflash.decoding.hybrid import convolution_windows
from treeflash.decoding.tree import DraftTree
from treeflash.errors import is_out_of_memory
from treeflash_cuda.cache import decoded, quantise
from treeflash_cuda.gpu.compilation import compiling_announced, reason_of
from treeflash_cuda.operations import Operations, Shapes
from treeflash_cuda.quantised_weights import GROUP, quantise_weight
from treeflash_cuda.recurrence import TreeNodes, plan_nodes
from treeflash_cuda.visible_keys import PAGE, RowPlan, VisibleKeys

LOGGER = logging.getLogger(__name__)

TOLERANCES = {torch.bfloat16: 0.01, torch.float16: 0.01, torch.float32: 1e-5}
"""Root mean square error of a kernel's rows in standard deviations. In bfloat16, rounding alone
gives 0.003; a row that sees another row's key, or misses one, differs by more than 0.05."""

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
    yield operations.gated(gate, up, "gelu_pytorch_tanh")


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
