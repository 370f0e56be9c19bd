"""Hybrid targets: recurrent layers of unmodified transformers models on draft trees.

`treeflash.decoding.hybrid` has the formulas. Everything is computed in float32.

A forward pass changes no state: it leaves what commits need, which is used or dropped later. There
are two kinds of passes:

- `HybridCache`: the rows of several sequences follow one another, and recurrent layers run sequence
  by sequence.
- `HybridTreeCache`: trees of equally many nodes. Recurrent layers run all of them at once, in
  operations on tensors alone, with shapes that a CUDA graph can have.

The `forward` of a mixer finds its convolution and its recurrence under names of its module, which
are the same in all models. Each mixer gets a copy of its `forward`, whose globals have the hooks of
this module under those names: no module and no class is changed. For the next tokens of a sequence,
and outside of such a pass, the hooks call the model's own functions, so that
installed kernels serve prompts and plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.activations import ACT2FN

from treeflash.decoding.hybrid import convolution_tail, convolution_windows
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.cache import KVCache, Slab, SlabCache, TreeCache
from treeflash_cuda.fused_layers import forward_with, names_in_forward
from treeflash_cuda.numerics import upload

MANY_NODES = 8
"""From this many nodes on, gates of single channels are applied depth by depth: the decays of all
pairs of nodes would take n * n * key_dim exponentials a head."""
L2_EPS = 1e-6
MAMBA_2 = "mamba2_chunk_scan"

TAIL, MATRIX = 0, 1
"""Kinds of states."""

Key: TypeAlias = tuple[int, int, int]
"""The kind of a state, its layer, and its index among the layer's states of this kind."""
CommittedStates: TypeAlias = Mapping[Key, Tensor]
"""States after the last committed position. No tensor is ever changed in place.

A tail is (1, channels, kernel - 1), the last inputs of a short convolution. A matrix is (1, heads,
key_dim, value_dim) or, if it is transposed, (1, heads, value_dim, key_dim).
"""
Original: TypeAlias = Callable[..., Any]
"""The function of a model that a hook replaces."""


@dataclass(frozen=True, eq=False)
class TreeNodes:
    """The nodes of the trees that a recurrence runs at once, n of each tree."""

    ancestors: Tensor  # (trees, n, n) bool, as `DraftTree.ancestor_mask`
    parents: NDArray[np.int32] | None = None  # (n,) of a single tree, if the host knows them


@dataclass(frozen=True, eq=False)
class Writes:
    """The updates of a layer's state by the nodes of trees."""

    # (trees, heads, key_dim, value_dim) before the trees, float32; transposed if the model's is.
    state: Tensor
    u: Tensor  # (trees, heads, n, value_dim)
    k: Tensor  # (trees, heads, n, key_dim)
    log_g: Tensor  # (trees, heads, n, 1) log decays, or (trees, heads, n, key_dim) of channels
    transposed: bool = False  # whether states are (trees, heads, value_dim, key_dim)

    def commit(self, path: Tensor) -> Tensor:
        """Compute the state after a path of (a,) nodes of a single tree."""
        u, k, log_g = (x.index_select(2, path) for x in (self.u, self.k, self.log_g))
        return torch.addcmul(*state_update(u, k, log_g, self.transposed), self.state)


def state_update(u: Tensor, k: Tensor, log_g: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return what rows add to a state, and the factor of the state before them; see `Writes`.

    The rows follow one another. A row whose u and log_g are 0 changes nothing.
    """
    # Decays after each row, summed directly: a difference of two sums would lose digits.
    later = F.pad(log_g[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))
    left, right = k * later.exp(), u
    if transposed:
        left, right = right, left
    return left.transpose(-1, -2) @ right, log_g.sum(-2).exp()[..., None]


def delta_rule(
    q: Tensor,  # (trees, heads, n, key_dim), normalised and scaled
    k: Tensor,  # (trees, heads, n, key_dim), normalised
    v: Tensor,  # (trees, heads, n, value_dim)
    log_g: Tensor,  # (trees, heads, n, 1), or (trees, heads, n, key_dim) for gates of channels
    beta: Tensor,  # (trees, heads, n, 1)
    state: Tensor,  # (trees, heads, key_dim, value_dim)
    nodes: TreeNodes,
) -> tuple[Tensor, Tensor]:
    """Compute the gated delta rule on trees: (trees, heads, n, value_dim), written values."""
    if log_g.shape[-1] > 1 and nodes.parents is not None and len(nodes.parents) >= MANY_NODES:
        return _by_depth(q, k, v, log_g, beta, state, nodes.parents)
    pairs, total = _decays(log_g, nodes.ancestors)
    decay = total.exp()
    right = beta * (v - (decay * k) @ state)
    # The solver reads the lower triangle, and takes the diagonal to be 1.
    system = beta * _products(k, k, pairs)
    u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return (decay * q) @ state + _products(q, k, pairs) @ u, u


def linear_rule(
    q: Tensor, k: Tensor, u: Tensor, log_g: Tensor, state: Tensor, nodes: TreeNodes
) -> Tensor:
    """Compute gated linear attention on trees, as `delta_rule`; `u` are the values written."""
    pairs, total = _decays(log_g, nodes.ancestors)
    return (total.exp() * q) @ state + _products(q, k, pairs) @ u


def _decays(log_g: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
    """Return decays from node j to i, 0 where i does not see j; log decays from the state.

    (trees, heads, n, n, 1 or key_dim) and (trees, heads, n, 1 or key_dim). Differences are masked
    before the exponential: off the paths they are positive and overflow.
    """
    total = ancestors[:, None].to(log_g.dtype) @ log_g
    difference = total[..., :, None, :] - total[..., None, :, :]
    return difference.masked_fill(~ancestors[:, None, :, :, None], float("-inf")).exp(), total


def _products(x: Tensor, k: Tensor, pairs: Tensor) -> Tensor:
    """Return the (trees, heads, n, n) decayed products of rows."""
    if pairs.shape[-1] == 1:
        return (x @ k.transpose(-1, -2)) * pairs[..., 0]
    return (x[..., :, None, :] * k[..., None, :, :] * pairs).sum(-1)


def _by_depth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor,
    beta: Tensor,
    state: Tensor,
    parents: NDArray[np.int32],
) -> tuple[Tensor, Tensor]:
    """Compute `delta_rule` for a single tree, depth by depth.

    The decayed keys on a node's path are its parent's keys, decayed once more. That takes n *
    depth * key_dim products, and no exponentials but the gates'.
    """
    depths = np.zeros(len(parents), np.int32)
    for node in range(1, len(parents)):
        depths[node] = depths[parents[node]] + 1
    gates, out, written = log_g.exp(), torch.empty_like(v), torch.empty_like(v)
    keys = k.new_zeros(*k.shape[:2], 1, 0, k.shape[-1])  # (1, heads, nodes, depth, key_dim)
    values = v.new_zeros(*v.shape[:2], 1, 0, v.shape[-1])
    total = torch.ones_like(k[:, :, :1])  # decay from the state
    rows = {-1: 0}  # the rows of the nodes of the depth above
    for depth in range(int(depths.max()) + 1):
        nodes = np.flatnonzero(depths == depth).tolist()
        above = torch.tensor([rows[int(parents[i])] for i in nodes], device=k.device)
        index = torch.tensor(nodes, device=k.device)
        gate, key, query = gates[:, :, index], k[:, :, index], q[:, :, index]
        total = total[:, :, above] * gate
        keys, values = keys[:, :, above] * gate[..., None, :], values[:, :, above]
        known = (total * key) @ state + ((keys @ key[..., None]) * values).sum(-2)
        u = beta[:, :, index] * (v[:, :, index] - known)
        keys = torch.cat([keys, key[..., None, :]], -2)
        values = torch.cat([values, u[..., None, :]], -2)
        out[:, :, index] = (total * query) @ state + ((keys @ query[..., None]) * values).sum(-2)
        written[:, :, index] = u
        rows = {node: row for row, node in enumerate(nodes)}
    return out, written


class StateLayout:
    """Groups of states that have one shape: `HybridTreeCache` has a tensor for each group.

    The groups of tails come before the groups of matrices.
    """

    def __init__(self, states: CommittedStates, transposed: frozenset[int]) -> None:
        """Take the shapes from the states of any sequence."""
        self.transposed = transposed  # see `RecurrentStates`
        self._zeros: dict[Key, Tensor] = {}  # without memory; matrices are float32
        groups: dict[Hashable, list[Key]] = {}
        for key in sorted(states):
            kind, layer, _ = key
            dtype = torch.float32 if kind == MATRIX else states[key].dtype
            self._zeros[key] = zeros = torch.zeros_like(states[key], dtype=dtype, device="meta")
            shared = kind, zeros.shape, dtype, layer in transposed
            groups.setdefault(shared, []).append(key)
        self.groups = list(groups.values())
        self.tails, self.matrices = (
            [keys for keys in self.groups if keys[0][0] == kind] for kind in (TAIL, MATRIX)
        )

    def stack(self, states: Sequence[CommittedStates], device: torch.device) -> list[Tensor]:
        """Return the (layers, sequences, ...) tails and float32 matrices of each group."""
        stacked = []
        for keys in self.groups:
            like = self._zeros[keys[0]]
            # Empty sequences have no states yet, which stands for zeros.
            parts = [x.get(key, like) for key in keys for x in states]
            found = [torch.zeros_like(x, device=device) if x is like else x for x in parts]
            joined = torch.cat([x.to(like.dtype) for x in found])
            stacked.append(joined.unflatten(0, (len(keys), -1)))
        return stacked

    def split(self, stacked: Sequence[Tensor]) -> CommittedStates:
        """View the tensors of all groups by layer."""
        groups = zip(self.groups, stacked, strict=True)
        return dict(pair for keys, x in groups for pair in zip(keys, x, strict=True))


@dataclass(frozen=True, eq=False)
class TreeWrites:
    """What the trees of several sequences write to the states of all layers, n nodes each."""

    layout: StateLayout
    nodes: int  # n
    before: Sequence[Tensor]  # the states, see `StateLayout.stack`
    # (layers, sequences, channels, kernel - 1 + n) inputs of convolutions for each group of tails;
    # and (layers, sequences, ...) u, k and log_g of `Writes` for each group of matrices.
    outputs: Sequence[Tensor]

    def rows(self, paths: Mapping[int, NDArray[np.int32]]) -> NDArray[np.int32]:
        """Return (sequences, ...) int32: the nodes on a path, and the rows of each group's tail."""
        widths = [x.shape[3] for x in self.before[: len(self.layout.tails)]]
        rows = np.zeros((self.before[0].shape[1], self.nodes + sum(widths)), np.int32)
        for i, path in paths.items():
            rows[i, path] = 1
            tails = [convolution_tail(path, width + 1) for width in widths]
            rows[i, self.nodes :] = np.concatenate([path[:0], *tails])
        return rows

    def commit(self, rows: Tensor, sequences: Sequence[int]) -> list[CommittedStates]:
        """Compute the states of some sequences after their paths, from the result of `rows`.

        Each sequence gets tensors of its own: the others may be kept for longer, or dropped.
        """
        tails, first = len(self.layout.tails), self.nodes
        stacked: list[list[Tensor]] = [[] for _ in sequences]
        for before, inputs in zip(self.before[:tails], self.outputs[:tails], strict=True):
            index = rows[:, first : first + before.shape[3]]
            first += before.shape[3]
            for i, parts in zip(sequences, stacked, strict=True):
                parts.append(inputs[:, i].index_select(2, index[i]))
        on_path = rows[None, :, None, : self.nodes, None].bool()
        for n, (keys, before) in enumerate(
            zip(self.layout.matrices, self.before[tails:], strict=True)
        ):
            u, k, log_g = self.outputs[tails + 3 * n :][:3]
            transposed = keys[0][1] in self.layout.transposed
            update, decay = state_update(
                u.masked_fill(~on_path, 0), k, log_g.masked_fill(~on_path, 0), transposed
            )
            for i, parts in zip(sequences, stacked, strict=True):
                parts.append(torch.addcmul(update[:, i], decay[:, i], before[:, i]))
        return [self.layout.split([x[:, None] for x in parts]) for parts in stacked]


class RecurrentStates:
    def __init__(self, transposed: frozenset[int]) -> None:
        self.transposed = transposed  # layers whose matrices have values before keys
        self.committed: CommittedStates = {}  # after the last committed position
        self.drop_pending()

    def drop_pending(self) -> None:
        """Drop the results of the last forward pass."""
        # Inputs of convolutions, and kernel - 1. The inputs are the tail and the n rows, (1,
        # channels, kernel - 1 + n), or only their end if all rows will be committed.
        self.inputs: dict[Key, tuple[Tensor, int]] = {}
        self.pending: dict[Key, Tensor | Writes] = {}  # matrices, or the writes of nodes
        # After a pass with a `HybridTreeCache`: its writes, and the index of the sequence.
        self.tree: tuple[TreeWrites, int] | None = None

    def states_after(self, path: Tensor) -> CommittedStates:
        """Compute the states after a path of (a,) nodes of the last pass with a `HybridCache`."""
        tails = {key: _tail(x, path, width) for key, (x, width) in self.inputs.items()}
        return tails | {
            key: value.commit(path) if isinstance(value, Writes) else value
            for key, value in self.pending.items()
        }

    def resume(self, committed: CommittedStates) -> None:
        """Replace the committed states, and forget the last block."""
        self.committed = committed
        self.drop_pending()

    def read(self) -> list[NDArray[np.float32]]:
        states = []
        for kind, layer, n in sorted(self.committed, key=lambda key: (key[1], key[0], key[2])):
            state = self.committed[kind, layer, n][0]
            if kind == TAIL or layer in self.transposed:
                state = state.mT
            states.append(state.float().cpu().numpy())
        return states


def _tail(inputs: Tensor, path: Tensor, width: int) -> Tensor:
    """Return (1, channels, width) last inputs after (a,) nodes; see `convolution_tail`."""
    if inputs.shape[2] == width:
        return inputs
    rows = torch.cat([torch.arange(width, device=path.device), path + width])
    return inputs.index_select(2, rows[len(path) :])


@dataclass(frozen=True, eq=False)
class SequenceRows:
    """The rows of one sequence in a forward pass."""

    states: RecurrentStates  # the states of the sequence
    first: int  # the first row
    count: int  # number of rows
    # Whose nodes the rows are; None for the next tokens of the sequence, all of which will be
    # committed.
    tree: DraftTree | None
    ancestors: Tensor | None  # (count, count) bool of the tree

    @property
    def nodes(self) -> TreeNodes:
        assert self.tree is not None
        assert self.ancestors is not None
        return TreeNodes(self.ancestors[None], self.tree.parents)

    def select(self, x: Tensor, axis: int = 1) -> Tensor:
        """Select the rows of this sequence in a tensor of all rows."""
        return x.narrow(axis, self.first, self.count)


class RecurrentCache(TreeCache):
    """`TreeCache` with recurrent states, under the names by which transformers' models use them."""

    def begin(self, attention_slots: dict[int, int], device: torch.device) -> None:
        # The index of every attention layer among the attention layers, by its index among all
        # layers; layers are added when they are called first.
        self.attention_slots = attention_slots
        self.device = device
        self._windows: dict[int, Tensor] = {}
        self._not_convolved: list[Tensor] = []
        self._pending: set[Key] = set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the hooks of recurrent layers use this cache in the model calls inside.

        Raises:
            UnsupportedModelError: a layer's inputs were convolved by a function without a hook.
        """
        token = _RUNNING.set(self)
        try:
            yield
        finally:
            _RUNNING.reset(token)
        if self._not_convolved:
            raise UnsupportedModelError("their convolution is computed by an unsupported function")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Use the index among attention layers: recurrent layers have no columns."""
        slot = self.attention_slots.setdefault(layer_idx, len(self.attention_slots))
        return super().update(key_states, value_states, slot, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Return None: a model that gets a state may shift it in place."""

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return whether `update_conv_state` is to return earlier inputs too."""
        return True

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        """Return inputs per sequence, (1, channels, ...): the last kernel - 1, then its rows."""
        if conv_kernel_size is None:
            raise UnsupportedModelError("cannot determine the convolution's kernel size")
        key = TAIL, layer_idx, state_idx
        result = self._join_inputs(conv_states, key, conv_kernel_size - 1)
        self._not_convolved.append(result)
        return result

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return None: the hooks have the states."""
        return None

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Check that `recur` has taken the states."""
        if (MATRIX, layer_idx, state_idx) not in self._pending:
            raise UnsupportedModelError(
                f"the recurrence of layer {layer_idx} is computed by an unsupported function"
            )
        return recurrent_states

    def convolve(
        self,
        original: Callable[..., Tensor],  # the model's function
        inputs: Tensor,  # the result of `update_conv_state`
        weight: Tensor,  # (channels, kernel)
        bias: Tensor | None = None,  # (channels,)
        activation: str | None = None,  # a name in transformers
        **kwargs: Any,  # other arguments of the model's function
    ) -> Tensor:
        """Return the (1, channels, rows) of a depthwise convolution."""
        self._not_convolved = [x for x in self._not_convolved if x is not inputs]
        kernel = weight.shape[1]
        if kernel not in self._windows:  # made once for all layers
            self._windows[kernel] = self._input_rows(kernel)
        windows = inputs[0][:, self._windows[kernel]]  # (channels, rows, kernel)
        out = (windows.float() * weight[:, None].float()).sum(-1)  # kernels sum in float32
        if bias is not None:
            out = out + bias[:, None].float()
        out = out.to(weight.dtype)
        return (out if activation is None else ACT2FN[activation](out))[None].to(inputs.dtype)

    def recur(
        self,
        layer: int,  # index
        rows: Sequence[Tensor],  # (1, rows, ...) inputs
        # Takes rows and a state (or None), returns outputs and the next state.
        next_tokens: Callable[..., tuple[Tensor, Tensor]],
        # Takes `TreeNodes`, (trees, n, ...) rows and states (or None), returns outputs and writes.
        tree: Callable[..., tuple[Tensor, Writes]],
    ) -> Tensor:
        """Return the (1, rows, ...) outputs of a recurrence."""
        raise NotImplementedError

    def _join_inputs(self, rows: Tensor, key: Key, width: int) -> Tensor:
        """See `update_conv_state`."""
        raise NotImplementedError

    def _input_rows(self, kernel: int) -> Tensor:
        """Return the (rows, kernel) inputs that each row's convolution reads."""
        raise NotImplementedError


class HybridCache(RecurrentCache):
    """The rows of several sequences; see the module's description."""

    def __init__(
        self,
        sequences: Sequence[KVCache],
        parts: Sequence[SequenceRows],
        attention_slots: dict[int, int],
        device: torch.device,
    ) -> None:
        super().__init__(sequences, [part.count for part in parts])
        self.begin(attention_slots, device)
        self.parts = parts  # the rows of each sequence
        self.is_step = sum(self.rows) == 1  # models have special functions for a single row
        for part in parts:
            part.states.drop_pending()

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Copy the state for a pass of one row, which may change it in place; else return None."""
        states, key = self.parts[0].states, (MATRIX, layer_idx, state_idx)
        if not self.is_step or (state := states.committed.get(key)) is None:
            return None
        states.pending[key] = state = state.clone()
        return state

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Take the state after a single row; after more rows `recur` has taken it."""
        key = MATRIX, layer_idx, state_idx
        if self.is_step and key not in self._pending:
            self.parts[0].states.pending[key] = recurrent_states
            return recurrent_states
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def convolve(
        self,
        original: Callable[..., Tensor],
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Convolve the next tokens of a single sequence by the model's own function."""
        if len(self.parts) > 1 or (self.parts[0].tree is not None and not self.is_step):
            return super().convolve(original, inputs, weight, bias, activation, **kwargs)
        self._not_convolved = [x for x in self._not_convolved if x is not inputs]
        out = original(inputs, weight, bias, activation=activation, **kwargs)
        return out[..., -self.parts[0].count :]

    def recur(
        self,
        layer: int,
        rows: Sequence[Tensor],
        next_tokens: Callable[..., tuple[Tensor, Tensor]],
        tree: Callable[..., tuple[Tensor, Writes]],
    ) -> Tensor:
        """Run the recurrence sequence by sequence."""
        key = MATRIX, layer, 0
        self._pending.add(key)
        outputs = []
        for part in self.parts:
            state = part.states.committed.get(key)
            inputs = [part.select(x) for x in rows]
            run = next_tokens if part.tree is None else partial(tree, part.nodes)
            output, part.states.pending[key] = run(*inputs, state)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _join_inputs(self, rows: Tensor, key: Key, width: int) -> Tensor:
        joined = []
        for part in self.parts:
            tail = part.states.committed.get(key)
            if tail is None:
                tail = rows.new_zeros(1, rows.shape[1], width)
            inputs = torch.cat([tail, part.select(rows, 2)], 2)
            joined.append(inputs)
            if part.tree is None:
                # The end is enough: a copy, so that the other inputs can be freed.
                inputs = inputs[:, :, inputs.shape[2] - width :].clone()
            part.states.inputs[key] = inputs, width
        return joined[0] if len(joined) == 1 else torch.cat(joined, 2)

    def _input_rows(self, kernel: int) -> Tensor:
        windows, first = [], 0
        for part in self.parts:
            tree = part.tree or DraftTree.chain(np.zeros(part.count, np.int32))
            windows.append(first + convolution_windows(tree.parents, kernel))
            first += kernel - 1 + part.count
        return upload(np.concatenate(windows), self.device).long()


class HybridTreeCache(RecurrentCache, SlabCache):
    """Trees of equally many nodes; see the module's description."""

    def __init__(
        self,
        slab: Slab | None,  # the slab of the sequences; None for a model without attention layers
        encode: Callable[[Tensor], Tensor],  # see `SlabCache`
        slots: Tensor,  # see `SlabCache`
        attention_slots: dict[int, int],
        layout: StateLayout,  # the layout of the target
        states: Sequence[Tensor],  # before the trees; see `StateLayout.stack`
        # (sequences, n, n) bool of the trees. A node that is not its own ancestor is a copy of the
        # root that fills a tree up.
        ancestors: Tensor,
    ) -> None:
        SlabCache.__init__(self, slab, encode, slots)
        self.begin(attention_slots, slots.device)
        self.layout = layout
        self.states = layout.split(states)  # with the sequences as first axis
        self.nodes = TreeNodes(ancestors)
        self._inputs: dict[Key, Tensor] = {}
        self._writes: dict[Key, Writes] = {}

    def outputs(self) -> list[Tensor]:
        found = [torch.stack([self._inputs[key] for key in keys]) for keys in self.layout.tails]
        for keys in self.layout.matrices:
            writes = [self._writes[key] for key in keys]
            parts = [x.u for x in writes], [x.k for x in writes], [x.log_g for x in writes]
            found += map(torch.stack, parts)
        return found

    def recur(
        self,
        layer: int,
        rows: Sequence[Tensor],
        next_tokens: Callable[..., tuple[Tensor, Tensor]],
        tree: Callable[..., tuple[Tensor, Writes]],
    ) -> Tensor:
        """Run the recurrence of all trees at once."""
        key = MATRIX, layer, 0
        self._pending.add(key)
        by_tree = [x[0].unflatten(0, self.nodes.ancestors.shape[:2]) for x in rows]
        output, self._writes[key] = tree(self.nodes, *by_tree, self.states[key])
        return output.flatten(0, 1)[None]

    def _join_inputs(self, rows: Tensor, key: Key, width: int) -> Tensor:
        by_tree = rows[0].unflatten(1, self.nodes.ancestors.shape[:2]).transpose(0, 1)
        self._inputs[key] = torch.cat([self.states[key], by_tree], 2)
        return self._inputs[key].transpose(0, 1).flatten(1)[None]

    def _input_rows(self, kernel: int) -> Tensor:
        """Compute `convolution_windows` on the device."""
        ancestors = self.nodes.ancestors
        trees, n, _ = ancestors.shape
        back = torch.arange(kernel - 1, -1, -1, device=self.device)
        depths = ancestors.sum(2, keepdim=True) - 1 - back  # of the inputs; negative in the tail
        nodes = ancestor_paths(ancestors).long().gather(2, depths.clamp(min=0))
        rows = kernel - 1 + torch.where(depths < 0, depths, nodes)
        first = torch.arange(trees, device=self.device) * (kernel - 1 + n)
        return (rows + first[:, None, None]).flatten(0, 1)


def ancestor_paths(ancestors: Tensor) -> Tensor:
    """Return (t, n, n) int32 rows of each node's ancestors by depth, from (t, n, n) bool ancestors.

    Entries beyond a node's own depth are 0.
    """
    n = ancestors.shape[-1]
    rank = ancestors.cumsum(-1) - 1
    rows = torch.arange(n, dtype=torch.int32, device=ancestors.device).expand_as(ancestors)
    paths = rows.new_zeros(*ancestors.shape[:-1], n + 1)
    return paths.scatter_(-1, rank.masked_fill(~ancestors, n), rows)[..., :n]


_RUNNING: ContextVar[RecurrentCache | None] = ContextVar("hybrid_cache", default=None)
"""The cache of the current forward pass."""


def hook_recurrent_layers(model: nn.Module) -> dict[int, set[str]]:
    """Install hooks in all mixers; return the names of the hooked functions, by layer."""
    hooked: dict[int, set[str]] = {}
    for module in model.modules():
        layer: Any = getattr(module, "layer_idx", None)
        if layer is not None and not HOOKS.keys().isdisjoint(names_in_forward(module)):
            hooks = {name: partial(hook, layer) for name, hook in HOOKS.items()}
            module.forward, names = forward_with(module, hooks)
            hooked.setdefault(layer, set()).update(names)
    return hooked


def _convolution(layer: int, original: Original, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the hook of `causal_conv1d_fn`."""
    cache = _RUNNING.get()
    if cache is None:
        return original(inputs, *args, **kwargs)
    return cache.convolve(original, inputs, *args, **kwargs)


def _gated_delta_rule(
    layer: int,
    original: Original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the hook of the gated delta rule, and of Kimi's delta attention (g by channel)."""
    kwargs["use_qk_l2norm_in_kernel"] = use_qk_l2norm_in_kernel
    cache = _RUNNING.get()
    if cache is None:
        return original(query, key, value, g=g, beta=beta, initial_state=initial_state, **kwargs)

    def next_tokens(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return original(q, k, v, g=g, beta=beta, initial_state=state, **kwargs)

    def tree(
        nodes: TreeNodes,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor | None,
    ) -> tuple[Tensor, Writes]:
        dtype, repeats = q.dtype, v.shape[2] // k.shape[2]
        if repeats > 1:
            q, k = (x.repeat_interleave(repeats, 2) for x in (q, k))
        q, k, v, g = (x.transpose(1, 2).float() for x in (q, k, v, g))
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS) for x in (q, k))
        q, g = q * q.shape[-1] ** -0.5, g if g.ndim == 4 else g[..., None]
        if state is None:
            state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        state, beta = state.float(), beta.transpose(1, 2).float()[..., None]
        out, u = delta_rule(q, k, v, g, beta, state, nodes)
        return out.transpose(1, 2).to(dtype), Writes(state, u, k, g)

    out = cache.recur(layer, (query, key, value, g, beta), next_tokens, tree)
    return out, out.new_empty(0)  # the model hands it to the cache, which has taken the states


def _mamba_2(
    layer: int,
    original: Original,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    **kwargs: Any,
) -> Any:
    """Return the hook of `mamba2_chunk_scan`.

    On a tree dt is not limited: the models' single step does not limit it, and a tree must equal
    plain decoding.
    """
    cache = _RUNNING.get()
    if cache is None:
        kwargs |= {"initial_states": initial_states, "return_final_states": return_final_states}
        return original(x, dt, a, b, c, **kwargs)

    def next_tokens(
        x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        states = {"initial_states": state, "return_final_states": True}
        return original(x, dt, a, b, c, **kwargs | states)

    def tree(
        nodes: TreeNodes, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Writes]:
        if (bias := kwargs.get("dt_bias")) is not None:
            dt = dt + bias.to(dt.dtype)
        if kwargs.get("dt_softplus"):
            dt = F.softplus(dt)
        repeats = x.shape[2] // b.shape[2]
        k, q = (y.float().repeat_interleave(repeats, 2).transpose(1, 2) for y in (b, c))
        x, dt = x.float(), dt.float()
        u = (x * dt[..., None]).transpose(1, 2)
        g = (a.float() * dt).transpose(1, 2)[..., None]
        if state is None:
            state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], k.shape[3])
        state = state.float()
        out = linear_rule(q, k, u, g, state.transpose(-1, -2), nodes).transpose(1, 2)
        if (skip := kwargs.get("D")) is not None:
            out = out + skip[:, None] * x
        return out.contiguous(), Writes(state, u, k, g, transposed=True)

    out = cache.recur(layer, (x, dt, b, c), next_tokens, tree)
    return (out, out.new_empty(0)) if return_final_states else out  # as above


HOOKS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "chunk_kimi_delta_attention": _gated_delta_rule,
    MAMBA_2: _mamba_2,
}
