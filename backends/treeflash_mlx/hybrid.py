"""Hybrid targets: the recurrent layers of unmodified mlx-lm models on draft trees.

The formulas are in `treeflash.decoding.hybrid`. Here matrix states have the shape
(value_dim, key_dim), as mlx-lm keeps them, unless `keys_first` says otherwise.

This file follows a forward pass. `NodePaths` holds the ancestors of all nodes. `run_tree` computes
the outputs of one layer, with a `Solver` for the delta rule, and returns the `Writes` that a commit
needs in place of a new state. Functions with the names and arguments of mlx-lm's own functions call
it, and `overrides.rebind` makes a model call them. `BatchStates` holds the committed states,
`RecurrentTreeCache` connects them with one layer during a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models import gated_delta
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.ssm import compute_dt
from numpy.typing import NDArray

from treeflash.decoding.hybrid import convolution_tail, convolution_windows, depth_first
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash_mlx.metal_kernels import (
    ROUNDING,
    choose,
    make_kernel,
    padded,
    relative_error,
    runs_kernels,
)
from treeflash_mlx.metal_kernels.gated_delta import SLOTS, Steps, run_nodes, runs_shape

Solver: TypeAlias = Callable[[mx.array, mx.array, int], mx.array]
"""Returns u with (1 + M) u = b.

Its arguments are M (batch, heads, n, n), b (batch, heads, n, value_dim) and the depth of the
deepest node. Only the part of M below the diagonal is read; it is 0 for nodes that are not on one
path.
"""


class NodePaths:
    """The ancestors of the nodes of several trees, for the recurrent layers of one forward pass.

    Trees smaller than the largest one are padded with nodes that continue the committed sequence,
    as a root does. There are `batch_size` trees of n `nodes`, down to a `depth`; a root has depth
    0. (batch, 1, n, n) `ancestors` [i, 0, j, k] is true if k is j or an ancestor of j. `solve`
    serves the delta rule.
    """

    def __init__(self, trees: Sequence[DraftTree], solve: Solver) -> None:
        nodes = max(map(len, trees))
        self.batch_size, self.nodes, self.solve = len(trees), nodes, solve
        self.depth = max(int(tree.depths.max()) for tree in trees)
        ancestors = np.zeros((self.batch_size, 1, nodes, nodes), np.bool_)
        ancestors[:] = np.eye(nodes, dtype=np.bool_)
        self._parents = np.full((self.batch_size, nodes), -1, np.int32)
        for i, tree in enumerate(trees):
            size = len(tree)
            ancestors[i, 0, :size, :size] = tree.ancestor_mask()
            self._parents[i, :size] = tree.parents
        self.ancestors = mx.array(ancestors)
        self._trees = trees
        self._windows: dict[int, mx.array] = {}

    def windows(self, kernel: int) -> mx.array:
        """Make every tree's `convolution_windows` once: (batch, n, kernel) int32."""
        if kernel not in self._windows:
            rows = np.stack([convolution_windows(parents, kernel) for parents in self._parents])
            self._windows[kernel] = mx.array(rows)
        return self._windows[kernel]

    @cached_property
    def visits(self) -> tuple[mx.array, mx.array] | None:
        """(batch, n, 3) orders of the nodes and (batch,) numbers of them, for Metal kernels.

        None where there are no kernels, or if the walk through a tree needs too many slots.
        """
        if not runs_kernels():
            return None
        orders = np.full((self.batch_size, self.nodes, 3), -1, np.int32)
        for i, tree in enumerate(self._trees):
            orders[i, : len(tree)], slots = depth_first(tree.parents)
            if slots > SLOTS:
                return None
        counts = mx.array([len(tree) for tree in self._trees], mx.int32)
        return padded(mx.array(orders)), padded(counts)  # once for all layers


@dataclass(frozen=True, eq=False)
class Writes:
    """What the nodes of a pass write into matrix states, each on the state after its parent.

    The log decays are each node's own, not summed along paths. They have key_dim columns if
    every key channel has a gate.
    """

    values: mx.array  # (batch, heads, n, value_dim) float32, u in the formulas
    keys: mx.array  # (batch, heads, n, key_dim) float32
    log_decays: mx.array  # (batch, heads, n, 1 or key_dim) float32
    keys_first: bool = False  # whether the model keeps its states as (key_dim, value_dim)

    def commit(self, state: mx.array | None, nodes: mx.array, kept: mx.array) -> mx.array:
        """Compute the states after a path of each sequence; None in place of old states is zeros.

        The nodes of the paths are (batch, a) int32. `kept`, (batch, a) bool, is false for nodes
        that only fill the row of a shorter path.
        """
        kept = kept[:, None, :, None]
        values, keys, log_decays = (
            mx.take_along_axis(x, mx.broadcast_to(nodes[:, None, :, None], shape), 2)
            for x in (self.values, self.keys, self.log_decays)
            for shape in [(*x.shape[:2], nodes.shape[1], x.shape[3])]
        )
        values, log_decays = mx.where(kept, values, 0), mx.where(kept, log_decays, 0)
        # The decays are summed directly: where much has decayed, a difference of two sums loses its
        # digits.
        later = mx.cumsum(log_decays, axis=2, reverse=True, inclusive=False)
        written = values.swapaxes(2, 3) @ (keys * mx.exp(later))
        if state is None:
            return written.swapaxes(2, 3) if self.keys_first else written
        decay = mx.exp(log_decays.sum(2, keepdims=True))
        if self.keys_first:
            decay, written = decay.swapaxes(2, 3), written.swapaxes(2, 3)
        return (decay * state.astype(mx.float32) + written).astype(state.dtype)


def run_tree(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    log_decays: mx.array,
    state: mx.array | None,
    paths: NodePaths,
    betas: mx.array | None = None,
) -> tuple[mx.array, Writes]:
    """Run a recurrent layer: its outputs at all nodes, and what they write; the state is unchanged.

    Shapes: queries and keys (batch, heads, n, key_dim); values and outputs (batch, heads, n,
    value_dim); log_decays as in `Writes`; state (batch, heads, value_dim, key_dim) before the
    trees, None for zeros; betas (batch, heads, n, 1) of the delta rule, None for linear attention.
    All but the state are float32.
    """
    if state is None:
        state = mx.zeros((*values.shape[:2], values.shape[3], keys.shape[3]), mx.float32)
    by_key = state.astype(mx.float32).swapaxes(2, 3)
    totals = paths.ancestors.astype(mx.float32) @ log_decays
    decays = mx.exp(totals)
    products = path_products(keys, totals, paths)
    if betas is not None:
        targets = betas * (values - (decays * keys) @ by_key)
        values = paths.solve(betas * products(keys), targets, paths.depth)
    outputs = (decays * queries) @ by_key + products(queries) @ values
    return outputs, Writes(values, keys, log_decays)


def path_products(
    keys: mx.array, totals: mx.array, paths: NodePaths
) -> Callable[[mx.array], mx.array]:
    """Return a function from (batch, heads, n, key_dim) rows to (batch, heads, n, n) products.

    It multiplies the row of a node with the decayed keys on the node's path; off the path are
    zeros. `totals` are log decays, summed over each node and its ancestors.
    """
    if totals.shape[3] == 1:
        # Differences are masked before exp, as off the paths they are positive and overflow.
        differences = mx.where(paths.ancestors, totals - totals.swapaxes(2, 3), -mx.inf)
        pairs = mx.exp(differences)
        return lambda rows: (rows @ keys.swapaxes(2, 3)) * pairs
    # A gate per channel cannot be taken out of the sum over channels. Only the keys of each node's
    # path are gathered: all pairs of nodes would need several times as many exponentials.
    length = paths.depth + 1
    nodes = paths.windows(length) - (length - 1)
    batch, heads, n, width = keys.shape
    on_path = (nodes >= 0)[:, None, :, :, None]
    index = mx.maximum(nodes, 0).reshape(batch, 1, n * length, 1)
    index = mx.broadcast_to(index, (batch, heads, n * length, width))
    path_totals, path_keys = (
        mx.take_along_axis(x, index, 2).reshape(batch, heads, n, length, width)
        for x in (totals, keys)
    )
    differences = mx.where(on_path, totals[:, :, :, None] - path_totals, -mx.inf)
    path_keys = path_keys * mx.exp(differences)
    # Products off the path go to an extra column, which is dropped.
    columns = mx.where(nodes >= 0, nodes, n)[:, None]
    columns = mx.broadcast_to(columns, (batch, heads, n, length))

    def products(rows: mx.array) -> mx.array:
        on_paths = (path_keys @ rows[..., None])[..., 0]
        zeros = mx.zeros((batch, heads, n, n + 1), on_paths.dtype)
        return mx.put_along_axis(zeros, columns, on_paths, 3)[..., :n]

    return products


SUBSTITUTION = """
    uint column = thread_position_in_grid.x;
    uint matrix = thread_position_in_grid.y;
    uint n = system_shape[2], width = targets_shape[3];
    for (uint i = 0; i < n; ++i) {
        float u = targets[(matrix * n + i) * width + column];
        for (uint j = 0; j < i; ++j)
            u -= system[(matrix * n + i) * n + j] * solution[(matrix * n + j) * width + column];
        solution[(matrix * n + i) * width + column] = u;
    }
"""


def solve_by_rounds(system: mx.array, targets: mx.array, depth: int) -> mx.array:
    """Solve in rounds (a `Solver`): as M is nilpotent, nodes of depth d are exact after d."""
    system = mx.where(mx.tri(system.shape[2], k=-1, dtype=mx.bool_), system, 0)
    solution = targets
    for _ in range(depth):
        solution = targets - system @ solution
    return solution


def solve_by_substitution(system: mx.array, targets: mx.array, depth: int) -> mx.array:
    """Solve in one Metal kernel with a thread per column; each round would be a launch."""
    kernel = make_kernel("substitution", ("system", "targets"), ("solution",), SUBSTITUTION)
    batch, heads, _, width = targets.shape
    (solution,) = kernel(
        inputs=[system, targets],
        grid=(width, batch * heads, 1),
        threadgroup=(min(width, 128), 1, 1),
        output_shapes=[targets.shape],
        output_dtypes=[targets.dtype],
    )
    return solution


MAX_SOLVER_ERROR = 1e-3
"""Of a solver, relative to the largest entry of the solution; float32 reaches 1e-6."""


def choose_solver() -> Solver:
    """Return the fastest correct solver on this device.

    Raises an UnsupportedModelError if no solver is correct.
    """
    if runs_kernels():
        winner = choose(
            "recurrent layers",
            "substitution",
            "all sizes",
            lambda _: {"": solver_error(solve_by_substitution)},
            MAX_SOLVER_ERROR,
        )
        if winner is not None:
            return solve_by_substitution
    if not (error := solver_error(solve_by_rounds)) <= MAX_SOLVER_ERROR:
        raise UnsupportedModelError(
            "on this device recurrent layers compute different outputs on a draft tree than token "
            f"by token (relative error {error:.1e}); use method ar"
        )
    return solve_by_rounds


def solver_error(solver: Solver) -> float:
    """Measure a solver's largest error, relative to the largest entry of the solution.

    The system belongs to a chain whose keys resemble each other, so that what a node writes depends
    on all nodes before it. In a whole model the deepest nodes may count for less than rounding.
    """
    nodes, width = 24, 32
    rng = np.random.default_rng(0)
    system = np.tril(1 - 0.1 * rng.random((2, 3, nodes, nodes)), -1)
    expected = rng.normal(size=(2, 3, nodes, width))
    targets = expected + system @ expected
    solution = solver(mx.array(system, mx.float32), mx.array(targets, mx.float32), nodes - 1)
    return float(np.abs(np.array(solution) - expected).max() / np.abs(expected).max())


def gated_delta_update(
    paths: NodePaths,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,  # noqa: N803
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, Writes | Steps]:
    """Compute the gated delta rule, with a gate per head or per key channel.

    Shapes: q and k (batch, n, key_heads, key_dim), normalised, q also scaled; v (batch, n, heads,
    value_dim); a (batch, n, heads) or (batch, n, heads, key_dim); b (batch, n, heads); state
    (batch, heads, value_dim, key_dim). `mask` is None, since no sequence is padded. Beta reaches 2
    if `allow_neg_eigval`.
    """
    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    if use_kernel and paths.visits is not None:
        shape = k.shape[2], *v.shape[2:], k.shape[3], q.dtype, a.ndim == 4
        if delta_kernel_wins(*shape):
            if lower_bound is None:
                decays = gated_delta.compute_g(A_log, a, dt_bias)
            else:
                decays = gated_delta.compute_lower_bound_g(A_log, a, dt_bias, lower_bound)
            steps = Steps(k, v, decays, beta)
            return run_nodes(q, steps, state, *paths.visits), steps
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        log_decays = -rate * nn.softplus(a + dt_bias)
    else:
        log_decays = lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
    return _delta_rule(paths, q, k, v, log_decays, beta, state)


def _delta_rule(
    paths: NodePaths,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decays: mx.array,
    beta: mx.array,
    state: mx.array | None,
) -> tuple[mx.array, Writes]:
    """Compute the gated delta rule by operations; see `gated_delta_update`."""
    if log_decays.ndim == 3:
        log_decays = log_decays[..., None]
    q_, k_, v_, g, betas = (_by_head(x, v.shape[2]) for x in (q, k, v, log_decays, beta[..., None]))
    outputs, writes = run_tree(q_, k_, v_, g, state, paths, betas)
    return outputs.swapaxes(1, 2).astype(q.dtype), writes


TIMED_TREE = DraftTree.from_parents(
    np.zeros(12, np.int32), np.array([-1, 0, 0, 1, 2, 2, 3, 3, 6, 7, 8, 8], np.int32)
)
TIMED_PATH = (0, 1, 3, 6, 8, 11)


@lru_cache(64)
def delta_kernel_wins(
    key_heads: int, heads: int, value_dim: int, key_dim: int, dtype: mx.Dtype, by_channel: bool
) -> bool:
    """Return whether gated delta nets of a shape run trees by their Metal kernel on this device.

    It is decided at load, when a pass over a tree is first built, and once in a process. The kernel
    has the operations of mlx-lm's kernel for single tokens in its order, but a compiler may
    contract either one: results within rounding are right, and the verdict says whether they have
    the same bits.
    """
    if not runs_shape(key_dim):
        return False
    n, paths = len(TIMED_TREE), NodePaths([TIMED_TREE], choose_solver())
    assert paths.visits is not None
    visits = paths.visits
    gates = (1, n, heads, key_dim) if by_channel else (1, n, heads)
    shapes = [(1, n, key_heads, key_dim)] * 2 + [(1, n, heads, value_dim), gates, (1, n, heads)]
    shapes.append((1, heads, value_dim, key_dim))
    keys = mx.random.split(mx.random.key(0), len(shapes))
    q, k, v, log_decays, b, state = (
        mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True)
    )
    norm = key_dim**-0.5
    q, k, v, beta = (x.astype(dtype) for x in (q * norm, k * norm, v, mx.sigmoid(b)))
    log_decays = -mx.abs(log_decays)
    steps = Steps(k, v, mx.exp(log_decays), beta)
    nodes, kept = mx.array([TIMED_PATH], mx.int32), mx.ones((1, len(TIMED_PATH)), mx.bool_)

    def by_kernel(state: mx.array) -> tuple[mx.array, mx.array]:
        return run_nodes(q, steps, state, *visits), steps.commit(state, nodes, kept)

    def by_operations(state: mx.array) -> tuple[mx.array, mx.array]:
        outputs, writes = _delta_rule(paths, q, k, v, log_decays, beta, state)
        return outputs, writes.commit(state, nodes, kept)

    def errors(_: str) -> dict[str, float]:
        outputs, after = by_kernel(state)
        expected, found = state, {}
        for node in TIMED_PATH:
            token = (x[:, node : node + 1] for x in (q, k, v, steps.g, beta))
            output, expected = gated_delta.gated_delta_kernel(*token, expected)
            found[f"node {node}"] = relative_error(outputs[:, node], output[:, 0])
        return found | {"the state": relative_error(after, expected)}

    def candidate(run: Callable[[mx.array], tuple[mx.array, mx.array]]) -> Callable[..., mx.array]:
        def call(state: mx.array, _: int) -> mx.array:
            outputs, after = run(state)
            return after + 0 * outputs.sum()

        return call

    what = "gated delta nets on trees"
    shape = f"{heads} heads of {value_dim} x {key_dim}{' by channel' if by_channel else ''}"
    timed = {"": candidate(by_kernel)}, candidate(by_operations), state
    key = key_heads, heads, value_dim, key_dim, dtype, by_channel
    verdict = choose(
        what, shape, f"{n} nodes", errors, ROUNDING[dtype], *timed, key=key, tells_bits=True
    )
    return verdict is not None


def ssm_update(
    paths: NodePaths,
    hidden_states: mx.array,
    A_log: mx.array,  # noqa: N803
    B: mx.array,  # noqa: N803
    C: mx.array,  # noqa: N803
    D: mx.array,  # noqa: N803
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, Writes]:
    """Compute Mamba-2 on trees.

    Shapes: hidden_states (batch, n, heads, head_dim); B, the keys, and C, the queries, (batch, n,
    groups, state_size); dt (batch, n, heads); A_log, D and dt_bias (heads,); state (batch, heads,
    head_dim, state_size). `mask` and `lengths` are None, since no sequence is padded.
    """
    dt = compute_dt(dt, dt_bias, time_step_limit)
    log_decays = dt * -mx.exp(A_log).astype(dt.dtype)
    values = dt[..., None] * hidden_states
    heads = hidden_states.shape[2]
    q, k, v, g = (_by_head(x, heads) for x in (C, B, values, log_decays[..., None]))
    outputs, writes = run_tree(q, k, v, g, state, paths)
    outputs = outputs.swapaxes(1, 2).astype(hidden_states.dtype)
    return outputs + hidden_states * D.reshape(1, 1, -1, 1), writes


def recurrent_gla(
    paths: NodePaths,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    scale: float,
    h: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, Writes]:
    """Compute lightning attention on trees: a fixed decay per head.

    Shapes: q, k and v (batch, heads, n, head_dim); g (heads,) log decays; the state h (batch,
    heads, head_dim, head_dim), keys first. `mask` is None, since no sequence is padded.
    """
    # mlx-lm rounds the decay to the type of the state, which counts at every step.
    decay = mx.exp(g).astype(mx.float32 if h is None else h.dtype)
    log_decays = mx.log(decay.astype(mx.float32))[None, :, None, None]
    log_decays = mx.broadcast_to(log_decays, (*k.shape[:3], 1))
    queries, keys, values = (x.astype(mx.float32) for x in (q * scale, k, v))
    state = None if h is None else h.swapaxes(2, 3)
    outputs, writes = run_tree(queries, keys, values, log_decays, state, paths)
    return outputs.astype(q.dtype), replace(writes, keys_first=True)


def _by_head(x: mx.array, heads: int) -> mx.array:
    """Return (batch, heads, n, d) float32 of (batch, n, heads or groups, d), repeating groups."""
    x = x.swapaxes(1, 2).astype(mx.float32)
    return x if x.shape[1] == heads else mx.repeat(x, heads // x.shape[1], 1)


FUNCTIONS: Mapping[str, Callable[..., tuple[mx.array, Writes | Steps]]] = {
    f.__name__: f for f in (gated_delta_update, ssm_update, recurrent_gla)
}
"""Functions over trees by the names of the functions of mlx-lm that they stand for."""


def is_short_convolution(module: nn.Module) -> bool:
    """Return whether a module convolves each channel alone, without padding."""
    return (
        isinstance(module, nn.Conv1d)
        and module.weight.shape[2] == 1
        and (module.padding, module.stride, module.dilation) == (0, 1, 1)
    )


def convolve_nodes(
    base: Callable[..., mx.array], module: nn.Module, inputs: mx.array, paths: NodePaths
) -> mx.array:
    """Return (batch, n, channels) of a short convolution at all nodes, each over its own ancestors.

    `base` is the module's own call; `inputs` are (batch, W - 1 + n, channels) for a kernel size W.
    """
    kernel, channels = module.weight.shape[1], inputs.shape[2]
    windows = paths.windows(kernel).reshape(paths.batch_size, -1, 1)
    rows = mx.take_along_axis(inputs, mx.broadcast_to(windows, (*windows.shape[:2], channels)), 1)
    nodes = rows.reshape(-1, kernel, channels)
    return base(module, nodes).reshape(paths.batch_size, paths.nodes, channels)


RecurrentStates: TypeAlias = list[list[mx.array | None]]
"""The states of one sequence: per recurrent layer and state, (1, ...); None before the first pass.

A commit makes new arrays and leaves these as they are.
"""


def state_arrays(states: Sequence[Sequence[mx.array | None]]) -> list[mx.array]:
    """Return all states that are not None, layer by layer."""
    return [x for layer in states for x in layer if x is not None]


class BatchStates:
    """The recurrent states of the sequences that run together; only a commit changes them.

    The `layers` have, per state, an array (batch, ...) after the committed positions; None before
    the first pass.
    """

    def __init__(self, sequences: Sequence[RecurrentStates]) -> None:
        self.batch_size = len(sequences)
        layers = zip(*sequences, strict=True)
        self.layers = [[_stack(parts) for parts in zip(*layer, strict=True)] for layer in layers]
        mx.eval(self.arrays)  # now: rows of another batch would keep the whole batch in memory

    @property
    def arrays(self) -> list[mx.array]:
        return state_arrays(self.layers)

    @property
    def nbytes(self) -> int:
        """Size of the states of all sequences, bytes."""
        return sum(x.nbytes for x in self.arrays)

    def sequence_states(self, row: int) -> RecurrentStates:
        if self.batch_size == 1:
            return [list(states) for states in self.layers]
        return [
            [x if x is None else mx.contiguous(x[row : row + 1]) for x in states]
            for states in self.layers
        ]

    def replace(self, row: int, states: RecurrentStates) -> None:
        """Give one sequence other states."""
        if self.batch_size == 1:
            self.layers = [list(layer) for layer in states]
            return
        chosen = mx.arange(self.batch_size) == row

        def merge(x: mx.array | None, new: mx.array | None) -> mx.array | None:
            return x if x is None else _where(chosen, mx.zeros_like(x) if new is None else new, x)

        self.layers = [list(map(merge, *pair)) for pair in zip(self.layers, states, strict=True)]

    def commit(
        self, written: Sequence[RecurrentTreeCache], paths: Mapping[int, NDArray[np.int32]]
    ) -> None:
        """Change to the states after paths of a pass, by row, the root first.

        Other sequences keep their states.

        Args:
            written: the caches of the recurrent layers in the pass.
            paths: (a,) int32 nodes by row.
        """
        if self.layers:
            commit = _Commit(paths, self.batch_size)
            self.layers = list(map(commit.layer_states, self.layers, written))

    @contextmanager
    def committed_early(self, written: Sequence[RecurrentTreeCache]) -> Iterator[None]:
        """Let a pass read the states after the only token of the pass before, of one sequence."""
        layers = self.layers
        self.commit(written, {0: np.zeros(1, np.int32)})
        try:
            yield
        finally:
            self.layers = layers


class RecurrentTreeCache(ArraysCache):
    """One recurrent layer in one forward pass; some models write to no other class of cache.

    It calls `on_read` when the layer reads its states.

    Attributes:
        paths: of the nodes; None if the pass is not over trees.
        written: by state, what the pass wrote: the state after all tokens, or in a pass over trees
            the `Writes` or `Steps` of a matrix state.
        inputs: (batch, W - 1 + n, channels) of each short convolution over trees, in order: the
            last inputs of the committed sequence, then the inputs of the nodes.
    """

    def __init__(
        self,
        batch: BatchStates,
        layer: int,
        paths: NodePaths | None,
        on_read: Callable[[RecurrentTreeCache], None],
    ) -> None:
        super().__init__(len(batch.layers[layer]))
        self._batch, self._layer, self._on_read, self.paths = batch, layer, on_read, paths
        self.written: dict[int, mx.array | Writes | Steps] = {}
        self.inputs: list[mx.array] = []

    @property
    def states(self) -> list[mx.array | None]:
        return self._batch.layers[self._layer]

    def __getitem__(self, i: int) -> mx.array | None:
        self._on_read(self)
        return self.states[i]

    def __setitem__(self, i: int, value: mx.array | Writes | Steps) -> None:
        self.written[i] = value

    def make_mask(self, n: int, **_: Any) -> None:
        """Make no mask: no sequence is padded."""

    @property
    def is_complete(self) -> bool:
        """Whether every state was written, in a pass over trees with what a commit needs."""
        if len(self.written) < len(self.states):
            return False
        if self.paths is None:
            return True
        inputs = [(x.shape[1] - self.paths.nodes, x.shape[2]) for x in self.inputs]
        tails = [x.shape[1:] for x in self.written.values() if isinstance(x, mx.array)]
        return tails == inputs


class _Commit:
    """The commit of paths of some of the sequences of a batch."""

    def __init__(self, paths: Mapping[int, NDArray[np.int32]], batch_size: int) -> None:
        nodes = np.zeros((batch_size, max(map(len, paths.values()))), np.int32)
        kept = np.zeros(nodes.shape, np.bool_)
        for row, path in paths.items():
            nodes[row, : len(path)], kept[row, : len(path)] = path, True
        self.paths, self.batch_size = paths, batch_size
        self.nodes, self.kept = mx.array(nodes), mx.array(kept)
        self.has_path = mx.array(kept[:, 0])
        self._tails: dict[int, mx.array] = {}

    def layer_states(
        self, states: Sequence[mx.array | None], layer: RecurrentTreeCache
    ) -> list[mx.array | None]:
        inputs = iter(layer.inputs)
        new = list(states)
        for i, value in sorted(layer.written.items()):
            old = states[i]
            if not isinstance(value, mx.array):
                new[i] = value.commit(old, self.nodes, self.kept)
                continue
            if layer.paths is not None:
                shape = (self.batch_size, *value.shape[1:])
                tail = mx.broadcast_to(self._tail(value.shape[1] + 1), shape)
                value = mx.take_along_axis(next(inputs), tail, 1)
            if len(self.paths) < self.batch_size:
                value = _where(self.has_path, value, mx.zeros_like(value) if old is None else old)
            new[i] = value
        return new

    def _tail(self, kernel: int) -> mx.array:
        """Make a convolution's (batch, W - 1, 1) int32 rows of inputs once for all layers."""
        if kernel not in self._tails:
            empty = np.zeros(0, np.int32)
            paths = [self.paths.get(row, empty) for row in range(self.batch_size)]
            tails = [convolution_tail(path, kernel) for path in paths]
            self._tails[kernel] = mx.array(np.stack(tails)[..., None])
        return self._tails[kernel]


def _where(chosen: mx.array, new: mx.array, old: mx.array) -> mx.array:
    """Select `new` for the chosen (batch,) sequences; arrays have a row per sequence, or one."""
    return mx.where(chosen.reshape(-1, *[1] * (old.ndim - 1)), new, old)


def _stack(parts: Sequence[mx.array | None]) -> mx.array | None:
    """Return the (batch, ...) states of sequences, with zeros for those that have not been run."""
    example = next((x for x in parts if x is not None), None)
    if example is None or len(parts) == 1:
        return example
    return mx.concatenate([mx.zeros_like(example) if x is None else x for x in parts])
