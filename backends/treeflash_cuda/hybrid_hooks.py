"""Recurrent layers of unmodified transformers models on draft trees.

The `forward` of a mixer finds its convolution and its recurrence under names of its module, which
are the same in all models. Each mixer gets a `forward` of its own with the same code, whose globals
have other functions under those names: no module and no class is changed. For the next tokens of a
text, and outside of a pass with a `HybridCache`, the model's own functions run, so that installed
kernels serve prompts and plain decoding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash_cuda.hybrid_cache import Block, running_cache
from treeflash_cuda.recurrence import Writes, delta_rule, linear_rule

L2_EPS = 1e-6
MAMBA_2 = "mamba2_chunk_scan"

Original = Callable[..., Any]


def hook_recurrent_layers(model: nn.Module) -> dict[int, set[str]]:
    """Hook every mixer of a model; returns the names that were found, by layer."""
    found: dict[int, set[str]] = {}
    for module in model.modules():
        forward: Any = inspect.unwrap(type(module).forward)
        code = getattr(forward, "__code__", None)
        names = [name for name in HOOKS if code is not None and name in code.co_names]
        if not names or not hasattr(module, "layer_idx"):
            continue
        layer: Any = module.layer_idx
        ours = {
            name: partial(HOOKS[name], forward.__globals__[name], layer)
            for name in names
            if name in forward.__globals__
        }
        copy = FunctionType(
            code,
            {**forward.__globals__, **ours},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        copy.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(copy, module)
        found.setdefault(layer, set()).update(ours)
    return found


def _convolution(original: Original, layer: int, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`causal_conv1d_fn`."""
    cache = running_cache()
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
    """`chunk_gated_delta_rule`, and the same of Kimi's delta attention, whose g is by channel."""
    kwargs["use_qk_l2norm_in_kernel"] = use_qk_l2norm_in_kernel
    cache = running_cache()
    if cache is None:
        whole: tuple[Tensor, Tensor | None] = original(
            query, key, value, g=g, beta=beta, initial_state=initial_state, **kwargs
        )
        return whole

    def next_tokens(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, after = original(q, k, v, g=g, beta=beta, initial_state=state, **kwargs)
        return out, after

    def tree(
        block: Block,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor | None,
    ) -> tuple[Tensor, Writes]:
        assert block.tree is not None
        assert block.ancestors is not None
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
        out, u = delta_rule(q, k, v, g, beta, state, block.ancestors, block.tree.parents)
        return out.transpose(1, 2).to(dtype), Writes(state, u, k, g)

    out = cache.recur(layer, (query, key, value, g, beta), next_tokens, tree)
    return out, _state_for_the_cache(out)


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
    """`mamba2_chunk_scan`.

    A tree does not limit dt, as the models' single step does not: it must equal plain decoding.
    """
    cache = running_cache()
    if cache is None:
        kwargs |= {"initial_states": initial_states, "return_final_states": return_final_states}
        return original(x, dt, a, b, c, **kwargs)

    def next_tokens(
        x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        own = kwargs | {"initial_states": state, "return_final_states": True}
        out, after = original(x, dt, a, b, c, **own)
        return out, after

    def tree(
        block: Block, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Writes]:
        assert block.ancestors is not None
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
        out = linear_rule(q, k, u, g, state, block.ancestors).transpose(1, 2)
        if (skip := kwargs.get("D")) is not None:
            out = out + skip[:, None] * x
        return out.contiguous(), Writes(state, u, k, g, transposed=True)

    out = cache.recur(layer, (x, dt, b, c), next_tokens, tree)
    return (out, _state_for_the_cache(out)) if return_final_states else out


def _state_for_the_cache(out: Tensor) -> Tensor:
    """What models hand on to the cache, which has the states already."""
    return out.new_empty(0)


HOOKS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "chunk_kimi_delta_attention": _gated_delta_rule,
    MAMBA_2: _mamba_2,
}
