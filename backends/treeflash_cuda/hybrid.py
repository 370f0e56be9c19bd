"""Hybrid targets: recurrent layers of unmodified transformers models on draft trees.

`treeflash.decoding.hybrid` has the formulas. Everything is computed in float32.

Rows of several sequences follow one another; recurrent layers run sequence by sequence. A forward
pass changes no state: it leaves pending states, which are committed or dropped later.

The `forward` of a mixer finds its convolution and its recurrence under names of its module, which
are the same in all models. Each mixer gets a copy of its `forward`, whose globals have the hooks of
this module under those names: no module and no class is changed. For the next tokens of a sequence,
and outside of a pass with a `HybridCache`, the hooks call the model's own functions, so that
installed kernels serve prompts and plain decoding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.activations import ACT2FN

from treeflash.decoding.hybrid import convolution_windows
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.cache import KVCache, TreeCache
from treeflash_cuda.numerics import upload

MANY_NODES = 8
"""From this many nodes on, gates of single channels are applied depth by depth: the decays of all
pairs of nodes would take n * n * key_dim exponentials a head."""
L2_EPS = 1e-6
MAMBA_2 = "mamba2_chunk_scan"

Key: TypeAlias = tuple[int, int]
"""A layer, and the index of one of its states."""
Original: TypeAlias = Callable[..., Any]
"""The function of a model that a hook replaces."""


@dataclass(frozen=True, eq=False)
class Writes:
    """The updates of a layer's state by the nodes of a tree."""

    state: Tensor  # (1, heads, key_dim, value_dim) before the tree
    u: Tensor  # (1, heads, n, value_dim)
    k: Tensor  # (1, heads, n, key_dim)
    log_g: Tensor  # (1, heads, n) log decays, or (1, heads, n, key_dim) of single channels
    transposed: bool = False  # whether the model keeps its state as (1, heads, value_dim, key_dim)

    def commit(self, path: Tensor) -> Tensor:
        """The state after a path of (a,) nodes, in the model's layout."""
        u, k, log_g = (x.index_select(2, path) for x in (self.u, self.k, self.log_g))
        log_g = log_g[..., None] if log_g.ndim == 3 else log_g
        # Decays after each node, summed directly: a difference of two sums would lose digits.
        later = log_g[:, :, 1:].flip(2).cumsum(2).flip(2)
        later = torch.cat([later, torch.zeros_like(log_g[:, :, :1])], 2)
        update = (k * later.exp()).transpose(-1, -2) @ u
        state = log_g.sum(2).exp()[..., None] * self.state + update
        return state.transpose(-1, -2).contiguous() if self.transposed else state


def delta_rule(
    q: Tensor,  # (1, heads, n, key_dim), normalised and scaled
    k: Tensor,  # (1, heads, n, key_dim), normalised
    v: Tensor,  # (1, heads, n, value_dim)
    log_g: Tensor,  # (1, heads, n), or (1, heads, n, key_dim) for gates of single channels
    beta: Tensor,  # (1, heads, n, 1)
    state: Tensor,  # (1, heads, key_dim, value_dim)
    ancestors: Tensor,  # (n, n) bool, as `DraftTree.ancestor_mask`
    parents: NDArray[np.int32],  # (n,) as in `DraftTree`
) -> tuple[Tensor, Tensor]:
    """(1, heads, n, value_dim) outputs of the gated delta rule on a tree, and written values."""
    if log_g.ndim == 4 and len(parents) >= MANY_NODES:
        return _by_depth(q, k, v, log_g, beta, state, parents)
    pairs, total = _decays(log_g, ancestors)
    decay = total.exp()
    right = beta * (v - (decay * k) @ state)
    # The solver reads the lower triangle, and takes the diagonal to be 1.
    system = beta * _products(k, k, pairs)
    u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return (decay * q) @ state + _products(q, k, pairs) @ u, u


def linear_rule(
    q: Tensor, k: Tensor, u: Tensor, log_g: Tensor, state: Tensor, ancestors: Tensor
) -> Tensor:
    """Gated linear attention on a tree; shapes as in `delta_rule`, `u` are the values written."""
    pairs, total = _decays(log_g, ancestors)
    return (total.exp() * q) @ state + _products(q, k, pairs) @ u


def _decays(log_g: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
    """Decays from node j to node i, 0 where i does not see j; and log decays from the state to i.

    (1, heads, n, n) and (1, heads, n, 1), or both with key_dim as the last axis. Differences are
    masked before the exponential: off the paths they are positive and overflow.
    """
    below = ancestors.to(log_g.dtype)
    if log_g.ndim == 3:
        total = log_g @ below.T
        difference = total[..., :, None] - total[..., None, :]
        return difference.masked_fill(~ancestors, float("-inf")).exp(), total[..., None]
    total = below @ log_g
    difference = total[..., :, None, :] - total[..., None, :, :]
    return difference.masked_fill(~ancestors[..., None], float("-inf")).exp(), total


def _products(x: Tensor, k: Tensor, pairs: Tensor) -> Tensor:
    """(1, heads, n, n) decayed products of rows."""
    if pairs.ndim == 4:
        return (x @ k.transpose(-1, -2)) * pairs
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
    """`delta_rule` depth by depth.

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
    rows = {-1: 0}  # of the nodes of the depth above
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


@dataclass(frozen=True, eq=False)
class CommittedStates:
    """States after the last committed position. No tensor is ever changed in place."""

    # (1, channels, kernel - 1) the last inputs of each short convolution.
    tails: Mapping[Key, Tensor] = field(default_factory=dict)
    # (1, heads, key_dim, value_dim) or, of Mamba-2, (1, heads, value_dim, key_dim).
    matrices: Mapping[Key, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.tails.values(), *self.matrices.values()]


class RecurrentStates:
    """The recurrent states of one sequence."""

    def __init__(self, transposed: frozenset[int]) -> None:
        self.transposed = transposed  # layers whose matrices have values before keys
        self.committed = CommittedStates()  # after the last committed position
        self.drop_pending()

    def drop_pending(self) -> None:
        """Drop the results of the last forward pass."""
        # Inputs of convolutions, and kernel - 1. The inputs are the tail and the n rows, (1,
        # channels, kernel - 1 + n), or only their end if all rows will be committed.
        self.inputs: dict[Key, tuple[Tensor, int]] = {}
        self.pending: dict[Key, Tensor | Writes] = {}  # matrices, or the writes of nodes

    def states_after(self, path: Tensor) -> CommittedStates:
        """The states after a path of (a,) nodes of the last forward pass."""
        return CommittedStates(
            {key: _tail(x, path, width) for key, (x, width) in self.inputs.items()},
            {
                key: value.commit(path) if isinstance(value, Writes) else value
                for key, value in self.pending.items()
            },
        )

    def resume(self, committed: CommittedStates) -> None:
        """Replace the committed states, and forget the last block."""
        self.committed = committed
        self.drop_pending()

    def read(self) -> list[NDArray[np.float32]]:
        states = [(layer, 0, n, x[0].T) for (layer, n), x in self.committed.tails.items()]
        for (layer, n), x in self.committed.matrices.items():
            states.append((layer, 1, n, x[0].transpose(1, 2) if layer in self.transposed else x[0]))
        states.sort(key=lambda state: state[:3])
        return [state.float().cpu().numpy() for *_, state in states]


def _tail(inputs: Tensor, path: Tensor, width: int) -> Tensor:
    """(1, channels, width) last inputs after a path of (a,) nodes; see `convolution_tail`."""
    if inputs.shape[2] == width:
        return inputs
    rows = torch.cat([torch.arange(width, device=path.device), path + width])
    return inputs.index_select(2, rows[len(path) :])


@dataclass(frozen=True, eq=False)
class SequenceRows:
    """The rows of one sequence in a forward pass."""

    states: RecurrentStates  # of the sequence
    first: int  # the first row
    count: int  # number of rows
    # Whose nodes the rows are; None for the next tokens of the sequence, all of which will be
    # committed.
    tree: DraftTree | None
    ancestors: Tensor | None  # (count, count) bool of the tree

    def select(self, x: Tensor, axis: int = 1) -> Tensor:
        """The rows of this sequence in a tensor of all rows."""
        return x.narrow(axis, self.first, self.count)


class HybridCache(TreeCache):
    """`TreeCache` with recurrent states, under the names by which transformers' models use them."""

    def __init__(
        self,
        sequences: Sequence[KVCache],
        parts: Sequence[SequenceRows],
        slots: dict[int, int],
        device: torch.device,
    ) -> None:
        super().__init__(sequences, [part.count for part in parts])
        self.parts = parts  # the rows of each sequence
        # The index of every attention layer among the attention layers, by its index among all
        # layers; layers are added when they are called first.
        self.slots = slots
        self.device = device
        self.is_step = sum(self.rows) == 1  # models have special functions for a single row
        for part in parts:
            part.states.drop_pending()
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
        slot = self.slots.setdefault(layer_idx, len(self.slots))
        return super().update(key_states, value_states, slot, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Return None: a model that gets a state may shift it in place."""

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether `update_conv_state` is to return earlier inputs too."""
        return True

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        """(1, channels, ...) inputs per sequence: the last kernel - 1 inputs, then its rows."""
        if conv_kernel_size is None:
            raise UnsupportedModelError("cannot determine the convolution's kernel size")
        key, width = (layer_idx, state_idx), conv_kernel_size - 1
        joined = []
        for part in self.parts:
            tail = part.states.committed.tails.get(key)
            if tail is None:
                tail = conv_states.new_zeros(1, conv_states.shape[1], width)
            inputs = torch.cat([tail, part.select(conv_states, 2)], 2)
            joined.append(inputs)
            if part.tree is None:
                # The end is enough: a copy, so that the other inputs can be freed.
                inputs = inputs[:, :, inputs.shape[2] - width :].clone()
            part.states.inputs[key] = inputs, width
        result = joined[0] if len(joined) == 1 else torch.cat(joined, 2)
        self._not_convolved.append(result)
        return result

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A copy, which the model may change in place, for a pass of one row; else None."""
        states, key = self.parts[0].states, (layer_idx, state_idx)
        if not self.is_step or (state := states.committed.matrices.get(key)) is None:
            return None
        states.pending[key] = state = state.clone()
        return state

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Take the state after a single row; after more rows `recur` has taken it."""
        key = layer_idx, state_idx
        if key not in self._pending:
            if not self.is_step:
                raise UnsupportedModelError(
                    f"the recurrence of layer {layer_idx} is computed by an unsupported function"
                )
            self.parts[0].states.pending[key] = recurrent_states
        return recurrent_states

    def convolve(
        self,
        original: Callable[..., Tensor],  # the model's function
        inputs: Tensor,  # the result of `update_conv_state`
        weight: Tensor,  # (channels, kernel)
        bias: Tensor | None = None,  # (channels,)
        activation: str | None = None,  # a name in transformers
        **kwargs: Any,  # further arguments of the model's function
    ) -> Tensor:
        """(1, channels, rows) of a depthwise convolution."""
        self._not_convolved = [x for x in self._not_convolved if x is not inputs]
        if len(self.parts) == 1 and (self.is_step or self.parts[0].tree is None):
            out = original(inputs, weight, bias, activation=activation, **kwargs)
            return out[..., -self.parts[0].count :]
        windows = inputs[0][:, self._input_rows(weight.shape[1])]  # (channels, rows, kernel)
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
        # Takes a `SequenceRows`, rows and a state (or None), returns outputs and writes.
        tree: Callable[..., tuple[Tensor, Writes]],
    ) -> Tensor:
        """Run a recurrence sequence by sequence; returns (1, rows, ...) outputs."""
        self._pending.add((layer, 0))
        outputs = []
        for part in self.parts:
            state = part.states.committed.matrices.get((layer, 0))
            inputs = [part.select(x) for x in rows]
            run = next_tokens if part.tree is None else partial(tree, part)
            output, part.states.pending[layer, 0] = run(*inputs, state)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _input_rows(self, kernel: int) -> Tensor:
        """(rows, kernel) the inputs that each row's convolution reads, made once for all layers."""
        if kernel not in self._windows:
            windows, first = [], 0
            for part in self.parts:
                tree = part.tree or DraftTree.chain(np.zeros(part.count, np.int32))
                windows.append(first + convolution_windows(tree.parents, kernel))
                first += kernel - 1 + part.count
            self._windows[kernel] = upload(np.concatenate(windows), self.device).long()
        return self._windows[kernel]


_RUNNING: ContextVar[HybridCache | None] = ContextVar("hybrid_cache", default=None)
"""The cache of the current forward pass."""


def hook_recurrent_layers(model: nn.Module) -> dict[int, set[str]]:
    """Hook every mixer of a model; returns the names of the hooked functions, by layer."""
    hooked: dict[int, set[str]] = {}
    for module in model.modules():
        forward: Any = inspect.unwrap(type(module).forward)
        code: CodeType | None = getattr(forward, "__code__", None)
        if code is None or not hasattr(module, "layer_idx"):
            continue
        names = [name for name in HOOKS if name in code.co_names]
        if not names:
            continue
        layer: Any = module.layer_idx
        hooks = {
            name: partial(HOOKS[name], forward.__globals__[name], layer)
            for name in names
            if name in forward.__globals__
        }
        rest = forward.__name__, forward.__defaults__, forward.__closure__
        copy = FunctionType(code, {**forward.__globals__, **hooks}, *rest)
        copy.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(copy, module)
        hooked.setdefault(layer, set()).update(hooks)
    return hooked


def _convolution(original: Original, layer: int, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The hook of `causal_conv1d_fn`."""
    cache = _RUNNING.get()
    if cache is None:
        return original(inputs, *args, **kwargs)
    return cache.convolve(original, inputs, *args, **kwargs)


def _gated_delta_rule(
    original: Original,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The hook of the gated delta rule, and of Kimi's delta attention, whose g is by channel."""
    kwargs["use_qk_l2norm_in_kernel"] = use_qk_l2norm_in_kernel
    cache = _RUNNING.get()
    if cache is None:
        return original(query, key, value, g=g, beta=beta, initial_state=initial_state, **kwargs)

    def next_tokens(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return original(q, k, v, g=g, beta=beta, initial_state=state, **kwargs)

    def tree(
        part: SequenceRows,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor | None,
    ) -> tuple[Tensor, Writes]:
        assert part.tree is not None
        assert part.ancestors is not None
        dtype, repeats = q.dtype, v.shape[2] // k.shape[2]
        if repeats > 1:
            q, k = (x.repeat_interleave(repeats, 2) for x in (q, k))
        q, k, v, g = (x.transpose(1, 2).float() for x in (q, k, v, g))
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS) for x in (q, k))
        q = q * q.shape[-1] ** -0.5
        if state is None:
            state = q.new_zeros(1, q.shape[1], q.shape[3], v.shape[3])
        state, beta = state.float(), beta.transpose(1, 2).float()[..., None]
        out, u = delta_rule(q, k, v, g, beta, state, part.ancestors, part.tree.parents)
        return out.transpose(1, 2).to(dtype), Writes(state, u, k, g)

    out = cache.recur(layer, (query, key, value, g, beta), next_tokens, tree)
    return out, out.new_empty(0)  # the model hands it to the cache, which has taken the states


def _mamba_2(
    original: Original,
    layer: int,
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
    """The hook of `mamba2_chunk_scan`.

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
        part: SequenceRows, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Writes]:
        assert part.ancestors is not None
        if (bias := kwargs.get("dt_bias")) is not None:
            dt = dt + bias.to(dt.dtype)
        if kwargs.get("dt_softplus"):
            dt = F.softplus(dt)
        repeats = x.shape[2] // b.shape[2]
        k, q = (y.float().repeat_interleave(repeats, 2).transpose(1, 2) for y in (b, c))
        x, dt = x.float(), dt.float()
        u = (x * dt[..., None]).transpose(1, 2)
        g = (a.float() * dt).transpose(1, 2)
        if state is None:
            state = x.new_zeros(1, x.shape[2], x.shape[3], k.shape[3])
        state = state.float().transpose(-1, -2)
        out = linear_rule(q, k, u, g, state, part.ancestors).transpose(1, 2)
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
