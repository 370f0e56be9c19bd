"""The recurrent layers of mlx-lm on draft trees: functions that stand for those its models call.

Each takes the function it stands for, the paths of the nodes, and that function's own arguments. It
returns outputs and, in place of a new state, what a commit needs.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.ssm import compute_dt

from treeflash_mlx.recurrence import NodePaths, Writes, run_tree


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
) -> tuple[mx.array, Writes]:
    """The gated delta rule, with a gate per head or per key channel.

    Args:
        paths: of the nodes.
        q: (texts, n, key_heads, key_dim) normalised and scaled.
        k: the same shape, normalised.
        v: (texts, n, heads, value_dim).
        a: (texts, n, heads) or (texts, n, heads, key_dim).
        b: (texts, n, heads).
        A_log: of the gate.
        dt_bias: of the gate.
        state: (texts, heads, value_dim, key_dim) float32.
        mask: None: no text is padded.
        use_kernel: has no meaning here.
        lower_bound: of the gate, if it has one.
        allow_neg_eigval: whether beta reaches 2.
    """
    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        log_decays = -rate * nn.softplus(a + dt_bias)
    else:
        log_decays = lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
    if log_decays.ndim == 3:
        log_decays = log_decays[..., None]
    heads = v.shape[2]
    outputs, written = run_tree(
        _by_head(q, heads),
        _by_head(k, heads),
        _by_head(v, heads),
        _by_head(log_decays, heads),
        _or_zeros(state, v, k),
        paths,
        _by_head(beta[..., None], heads),
    )
    return outputs.swapaxes(1, 2).astype(q.dtype), written


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
    """Mamba-2.

    Args:
        paths: of the nodes.
        hidden_states: (texts, n, heads, head_dim).
        A_log: (heads,).
        B: (texts, n, groups, state_size), the keys.
        C: the same shape, the queries.
        D: (heads,) of the residual.
        dt: (texts, n, heads).
        dt_bias: (heads,).
        state: (texts, heads, head_dim, state_size).
        time_step_limit: mlx-lm clamps single steps to it too.
        mask: None: no text is padded.
        lengths: None.
    """
    dt = compute_dt(dt, dt_bias, time_step_limit)
    log_decays = dt * -mx.exp(A_log).astype(dt.dtype)
    heads = hidden_states.shape[2]
    outputs, written = run_tree(
        _by_head(C, heads),
        _by_head(B, heads),
        _by_head(dt[..., None] * hidden_states, heads),
        _by_head(log_decays[..., None], heads),
        _or_zeros(state, hidden_states, B),
        paths,
    )
    outputs = outputs.swapaxes(1, 2).astype(hidden_states.dtype)
    return outputs + hidden_states * D.reshape(1, 1, -1, 1), written


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
    """Lightning attention: a fixed decay per head.

    Args:
        paths: of the nodes.
        q: (texts, heads, n, head_dim).
        k: the same shape.
        v: the same shape.
        g: (heads,) log decays.
        scale: of the queries.
        h: (texts, heads, head_dim, head_dim), keys first.
        mask: None: no text is padded.
    """
    # mlx-lm rounds the decay to the type of the state, which counts at every step.
    decay = mx.exp(g).astype(mx.float32 if h is None else h.dtype)
    log_decays = mx.log(decay.astype(mx.float32))[None, :, None, None]
    queries, keys, values = (x.astype(mx.float32) for x in (q * scale, k, v))
    state = _or_zeros(h, v.swapaxes(1, 2), k.swapaxes(1, 2))
    outputs, written = run_tree(
        queries,
        keys,
        values,
        mx.broadcast_to(log_decays, (*k.shape[:3], 1)),
        state if h is None else state.swapaxes(2, 3),
        paths,
    )
    written = Writes(written.values, written.keys, written.log_decays, keys_first=True)
    return outputs.astype(q.dtype), written


FUNCTIONS: Mapping[str, Callable[..., tuple[mx.array, Writes]]] = {
    f.__name__: f for f in (gated_delta_update, ssm_update, recurrent_gla)
}


def rebind(module: nn.Module, paths: Callable[[], NodePaths | None]) -> set[str]:
    """Let the methods of one module, and of no other, call the functions above over trees.

    A method finds what it calls under names of its module. The module gets a class whose methods
    have the same code, and other functions under those names.

    Args:
        module: any.
        paths: those of the pass that is being built; None if it is not one over trees.

    Returns:
        The names of the functions that it calls.
    """
    cls = type(module)
    methods: dict[str, Any] = {}
    found: set[str] = set()
    for base in reversed(cls.__mro__):
        for name, method in vars(base).items():
            if not isinstance(method, types.FunctionType):
                continue
            scope = method.__globals__
            used = FUNCTIONS.keys() & scope.keys() & set(method.__code__.co_names)
            if not used:
                continue
            ours = {key: partial(_call, scope[key], FUNCTIONS[key], paths) for key in used}
            copy = types.FunctionType(
                method.__code__, {**scope, **ours}, name, method.__defaults__, method.__closure__
            )
            copy.__kwdefaults__ = method.__kwdefaults__
            methods[name] = copy
            found |= used
    if methods:
        module.__class__ = type(cls.__name__, (cls,), methods)
    return found


def _call(
    original: Callable[..., Any],
    over_trees: Callable[..., Any],
    paths: Callable[[], NodePaths | None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    found = paths()
    return original(*args, **kwargs) if found is None else over_trees(found, *args, **kwargs)


def is_short_convolution(module: nn.Module) -> bool:
    """Whether a module convolves each channel by itself, without padding: over given inputs."""
    return (
        isinstance(module, nn.Conv1d)
        and module.weight.shape[2] == 1
        and (module.padding, module.stride, module.dilation) == (0, 1, 1)
    )


def convolve_nodes(
    base: Callable[..., mx.array], module: nn.Module, inputs: mx.array, paths: NodePaths
) -> mx.array:
    """A short convolution at all nodes, each over its own ancestors.

    Args:
        base: the module's own call.
        module: of kernel size W.
        inputs: (texts, W - 1 + n, channels).
        paths: of the nodes.

    Returns:
        (texts, n, channels).
    """
    kernel, channels = module.weight.shape[1], inputs.shape[2]
    windows = paths.windows(kernel).reshape(paths.texts, -1, 1)
    rows = mx.take_along_axis(inputs, mx.broadcast_to(windows, (*windows.shape[:2], channels)), 1)
    nodes = rows.reshape(-1, kernel, channels)
    return base(module, nodes).reshape(paths.texts, paths.rows, channels)


def _by_head(x: mx.array, heads: int) -> mx.array:
    """(texts, n, heads or groups, d) as (texts, heads, n, d) float32; groups are repeated."""
    x = x.swapaxes(1, 2).astype(mx.float32)
    return x if x.shape[1] == heads else mx.repeat(x, heads // x.shape[1], 1)


def _or_zeros(state: mx.array | None, values: mx.array, keys: mx.array) -> mx.array:
    """The state in float32; that of a new text if there is none."""
    if state is not None:
        return state.astype(mx.float32)
    texts, _, heads, value_dim = values.shape
    return mx.zeros((texts, heads, value_dim, keys.shape[3]), mx.float32)
