"""Hybrid targets: recurrent layers of unmodified transformers models on draft trees.

`treeflash.decoding.hybrid` has the formulas, and `recurrence` computes them.

A forward pass changes no state: what commits need is a part of its result (`PassRows.written`).
There are two kinds of passes:

- `HybridCache`: the rows of several sequences follow one another, and recurrent layers run sequence
  by sequence.
- `HybridTreeCache`: trees of equally many nodes. Recurrent layers run all of them at once, on
  states in the slots of an arena, with shapes that a CUDA graph can have.

The `forward` of a mixer finds its convolution and its recurrence under names that the modules of
all models share; since transformers 5.25 it finds some of them through a helper function of the
same file. Each mixer gets a copy of its `forward`, and of such helpers, whose globals have the
hooks of this module under those names: no module and no class is changed. For the next tokens of a
sequence, and outside of such a pass, the hooks call the model's own functions, so that installed
kernels serve prompts and plain decoding.

Why a copy. transformers has a registry of attention, but none of recurrences. Its hooks for kernels
change a function for all models of the process, and a `forward` of our own for each mixer would be
as much code as those of transformers. Layers of our own, which copy nothing, have gated delta nets
alone. This way also serves Mamba-2 (bamba, falcon_h1, granitemoehybrid, mamba2, nemotron_h,
zamba2), short convolutions (lfm2, lfm2_moe, lfm3), olmo_hybrid and lara_mini; and Qwen's gated
delta nets with images, in training, and where flash-linear-attention runs them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash.errors import UnsupportedModelError
from treeflash_cuda.cache import KVCache, Slab
from treeflash_cuda.gpu.tree_recurrences import TreeRecurrences
from treeflash_cuda.hf.model_caches import SlabCache, TreeCache
from treeflash_cuda.numerics import concatenate
from treeflash_cuda.recurrence import tree_recurrence, weigh_windows
from treeflash_cuda.recurrent_states import MATRIX, TAIL, Key, SequenceRows, Writes, plan_windows

MAMBA_2 = "mamba2_chunk_scan"

Original: TypeAlias = Callable[..., Any]
"""The function of a model that a hook replaces."""
Recurrence: TypeAlias = Callable[..., Tensor]
"""Runs `tree_recurrence` on the states and the nodes of a pass, and keeps what commits need: all
other arguments -> outputs."""
Filters: TypeAlias = tuple[Tensor, Tensor | None, str | None]
"""The (channels, kernel) weight and the (channels,) bias of a depthwise convolution, and the name
of an activation in transformers."""
NextTokens: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
"""Runs a recurrence over consecutive tokens: (1, n, ...) rows and a state (or None) -> outputs and
the next state."""
OverTrees: TypeAlias = Callable[..., Tensor]
"""Runs a recurrence over trees: a `Recurrence` and (trees, n, ...) rows -> outputs."""


class RecurrentCache(TreeCache):
    """`TreeCache` with recurrent states, under the names by which transformers' models use them."""

    def begin(self, attention_slots: dict[int, int]) -> None:
        # An attention layer's index among all layers gives its index among the attention layers;
        # layers are added when they are called first.
        self.attention_slots = attention_slots
        self._not_convolved: dict[Tensor, Key] = {}
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

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        """Return False: before transformers 5.21 models would then read the states themselves."""
        return False

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        """Return what the model hands to `convolve` as the inputs of its rows."""
        if conv_kernel_size is None:
            raise UnsupportedModelError("cannot determine the convolution's kernel size")
        key = TAIL, layer_idx, state_idx
        result = self._join_inputs(conv_states, key, conv_kernel_size - 1)
        self._not_convolved[result] = key
        return result

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return None: the hooks have the states."""
        return None

    def get_recurrent_states_to_keep(self, layer_idx: int | None = None) -> int:
        """Return 0: the hooks keep what commits need."""
        return 0

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
        if inputs not in self._not_convolved:
            raise UnsupportedModelError("their convolution is computed by an unsupported function")
        key = self._not_convolved.pop(inputs)
        own = partial(original, inputs, weight, bias, activation=activation, **kwargs)
        return self._convolve(key, inputs, (weight, bias, activation), own)

    def recur(
        self, layer: int, rows: Sequence[Tensor], next_tokens: NextTokens, tree: OverTrees
    ) -> Tensor:
        """Return the (1, n, ...) outputs of a recurrence from (1, n, ...) rows."""
        key = MATRIX, layer, 0
        self._pending.add(key)
        return self._recur(key, rows, next_tokens, tree)

    def _convolve(
        self, key: Key, inputs: Tensor, filters: Filters, own: Callable[[], Tensor]
    ) -> Tensor:
        """See `convolve`; the key is of the tail, and `own` calls the model's own function."""
        raise NotImplementedError

    def _recur(
        self, key: Key, rows: Sequence[Tensor], next_tokens: NextTokens, tree: OverTrees
    ) -> Tensor:
        """See `recur`; the key is of the matrix."""
        raise NotImplementedError

    def _join_inputs(self, rows: Tensor, key: Key, width: int) -> Tensor:
        """See `update_conv_state`. `convolve` joins the rows with the last inputs by default."""
        return rows


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
        self.begin(attention_slots)
        self.device = device
        self.parts = parts  # the rows of each sequence
        self._windows: dict[int, Tensor] = {}
        self.is_step = sum(self.rows) == 1  # models have special functions for a single row

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Copy the state for a pass of one row, which may change it in place; else return None."""
        (part, *_), key = self.parts, (MATRIX, layer_idx, state_idx)
        if not self.is_step or (state := part.states.committed.get(key)) is None:
            return None
        part.writes.matrices[key] = state = state.clone()
        return state

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Take the state after a single row; after more rows `recur` has taken it."""
        key = MATRIX, layer_idx, state_idx
        if self.is_step and key not in self._pending:
            self.parts[0].writes.matrices[key] = recurrent_states
            return recurrent_states
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def _convolve(
        self, key: Key, inputs: Tensor, filters: Filters, own: Callable[[], Tensor]
    ) -> Tensor:
        """Convolve the next tokens of a single sequence by the model's own function."""
        weight, bias, activation = filters
        if len(self.parts) > 1 or (self.parts[0].tree is not None and not self.is_step):
            windows = inputs[0][:, self._input_rows(weight.shape[1])]  # (channels, rows, kernel)
            bias = None if bias is None else bias[:, None]
            return weigh_windows(windows, weight[:, None], bias, activation)[None]
        return own()[..., -self.parts[0].count :]

    def _recur(
        self, key: Key, rows: Sequence[Tensor], next_tokens: NextTokens, tree: OverTrees
    ) -> Tensor:
        """Run the recurrence sequence by sequence."""
        outputs = []
        for part in self.parts:
            inputs = [part.select(x) for x in rows]
            if part.tree is None:
                state = part.states.committed.get(key)
                output, part.writes.matrices[key] = next_tokens(*inputs, state)
            else:
                output = tree(partial(self._run_tree, part, key), *inputs)
            outputs.append(output)
        return concatenate(outputs, 1)

    def _run_tree(
        self,
        part: SequenceRows,
        key: Key,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: Tensor,
        beta: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """See `Recurrence`."""
        transposed = key[1] in part.states.transposed
        state = part.states.committed.get(key)
        if state is None:
            state = v.new_zeros((1, v.shape[2], k.shape[3], v.shape[3]), dtype=torch.float32)
        elif transposed:
            state = state.mT
        slots = torch.zeros(1, dtype=torch.long, device=v.device)
        out, u, keys = tree_recurrence(*(q, k, v, log_g, beta, state, slots, part.nodes), **options)
        gates = log_g.transpose(1, 2).float()
        part.writes.matrices[key] = Writes(state.float(), u, keys, gates, transposed)
        return out

    def _join_inputs(self, rows: Tensor, key: Key, width: int) -> Tensor:
        joined = []
        for part in self.parts:
            tail = part.states.committed.get(key)
            if tail is None:
                tail = rows.new_zeros(1, rows.shape[1], width)
            inputs = torch.cat([tail, part.select(rows, 2)], 2)
            joined.append(inputs)
            if part.tree is None:
                # Only the end is kept, as a copy, so that the other inputs can be freed.
                inputs = inputs[:, :, inputs.shape[2] - width :].clone()
            part.writes.inputs[key] = inputs, width
        return concatenate(joined, 2)

    def _input_rows(self, kernel: int) -> Tensor:
        """Return the (rows, kernel) inputs that each row's convolution reads."""
        if kernel not in self._windows:  # made once for all layers
            self._windows[kernel] = plan_windows(self.parts, kernel, self.device)
        return self._windows[kernel]


class HybridTreeCache(RecurrentCache, SlabCache):
    """Trees of equally many nodes; see the module's description."""

    def __init__(
        self,
        slab: Slab | None,  # the slab of the sequences; None for a model without attention layers
        encode: Callable[[Tensor], Tensor],  # see `SlabCache`
        slots: Tensor,  # see `SlabCache`
        attention_slots: dict[int, int],
        recurrences: TreeRecurrences,
    ) -> None:
        SlabCache.__init__(self, slab, encode, slots)
        self.begin(attention_slots)
        self.recurrences = recurrences

    def _recur(
        self, key: Key, rows: Sequence[Tensor], next_tokens: NextTokens, tree: OverTrees
    ) -> Tensor:
        """Run the recurrence of all trees at once."""
        by_tree = [self.recurrences.by_tree(x[0]) for x in rows]
        return tree(partial(self.recurrences.recur, key), *by_tree).flatten(0, 1)[None]

    def _convolve(
        self, key: Key, inputs: Tensor, filters: Filters, own: Callable[[], Tensor]
    ) -> Tensor:
        """Convolve along the paths of all trees at once."""
        return self.recurrences.convolve_rows(key, inputs[0].mT, *filters).mT[None]


_RUNNING: ContextVar[RecurrentCache | None] = ContextVar("hybrid_cache", default=None)
"""The cache of the current forward pass."""


def copy_with_hooks(
    function: FunctionType, hooks: Mapping[str, Callable[..., Any]], *, helpers: bool = True
) -> tuple[FunctionType, set[str]]:
    """Copy a function that calls hooks; also return the names of the functions that they replace.

    Each of `hooks` replaces the global with its name, which it gets as its first argument. With
    `helpers`, functions of the same file that would call such a global are replaced by copies, too.
    """
    names = function.__globals__
    changed: dict[str, Any] = {}
    replaced: set[str] = set()
    for name in names.keys() & function.__code__.co_names:
        if name in hooks:
            changed[name] = partial(hooks[name], names[name])
            replaced.add(name)
        elif helpers and (helper := function_of_file(names[name], names)) is not None:
            copied, behind = copy_with_hooks(helper, hooks, helpers=False)
            if behind:
                changed[name] = copied
                replaced |= behind
    rest = function.__name__, function.__defaults__, function.__closure__
    copy = FunctionType(function.__code__, {**names, **changed}, *rest)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy, replaced


def function_of_file(value: Any, names: dict[str, Any]) -> FunctionType | None:
    """Return the function behind a global, if it is of the file whose globals are `names`.

    The decorators of the package `kernels`, which transformers needs, make a module of a function.
    """
    behind = [value]
    if isinstance(value, nn.Module):
        behind = [*inspect.getclosurevars(type(value).forward).nonlocals.values()]
    functions = (x for x in behind if isinstance(x, FunctionType) and x.__globals__ is names)
    return next(functions, None)


def hook_recurrent_layers(model: nn.Module) -> dict[int, set[str]]:
    """Install hooks in all mixers; return the names of the hooked functions, by layer."""
    hooked: dict[int, set[str]] = {}
    for module in model.modules():
        layer: Any = getattr(module, "layer_idx", None)
        forward = inspect.unwrap(type(module).forward)
        if layer is None or not isinstance(forward, FunctionType):
            continue
        hooks = {name: partial(hook, layer) for name, hook in HOOKS.items()}
        copy, names = copy_with_hooks(forward, hooks)
        if names:
            module.forward = MethodType(copy, module)
            hooked.setdefault(layer, set()).update(names)
    return hooked


def _convolution(layer: int, original: Original, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run in place of `causal_conv1d_fn`: on a tree, every node after its ancestors."""
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
    """Run in place of the gated delta rule, and of Kimi's delta attention (g by channel)."""
    kwargs["use_qk_l2norm_in_kernel"] = use_qk_l2norm_in_kernel
    cache = _RUNNING.get()
    if cache is None:
        return original(query, key, value, g=g, beta=beta, initial_state=initial_state, **kwargs)

    def next_tokens(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return original(q, k, v, g=g, beta=beta, initial_state=state, **kwargs)

    def tree(run: Recurrence, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        g = g if g.ndim == 4 else g[..., None]
        return run(*(q, k, v, g, beta), normalise=use_qk_l2norm_in_kernel, scale=k.shape[3] ** -0.5)

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
    """Run in place of `mamba2_chunk_scan`.

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

    def tree(run: Recurrence, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        dt = F.softplus(dt + kwargs["dt_bias"].to(dt.dtype)).float()
        x = x.float()
        out = run(c, b, x * dt[..., None], (a.float() * dt)[..., None], None)
        return (out + kwargs["D"][:, None] * x).contiguous()

    out = cache.recur(layer, (x, dt, b, c), next_tokens, tree)
    return (out, out.new_empty(0)) if return_final_states else out  # callers expect a pair here too


HOOKS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "chunk_kimi_delta_attention": _gated_delta_rule,
    MAMBA_2: _mamba_2,
}
