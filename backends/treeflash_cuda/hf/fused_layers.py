"""Parts of a model's layers, computed by one operation each.

These are norms, also of the sum of a sublayer's output and the residual, gated feed-forward
networks, and the rotation of queries and keys with the write to the KV cache. A part is replaced
only if the operation gives what the part gives: other models may have other activations, or rotate
other pairs of elements.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from types import FunctionType, MethodType
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from treeflash.errors import UnsupportedModelError, is_device_lost, is_out_of_memory
from treeflash_cuda.cache import dequantise
from treeflash_cuda.hf.attention_contexts import TreeContext, tree_context
from treeflash_cuda.operations import TOLERANCES, Activation, Operations, RandomInputs
from treeflash_cuda.visible_keys import VisibleKeys

TOLERANCE = 0.01
"""Root mean square difference, relative to the module's outputs."""
QUANTISED_TOLERANCE = 0.02
"""Tolerance for keys in 8 bits: some are rounded to another number."""
COMPARED_ROWS = 4
"""Rows of the input on which a module and the operation are compared."""
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""The activations of `operations.gated`."""
POINTS, SAME_FUNCTION = torch.linspace(-4, 4, 33), 1e-5
"""Where activations are compared, and how close they are: GELU and its approximation differ by
more."""
ROTARY = "apply_rotary_pos_emb"
"""The function that rotates queries and keys, by the name that attention layers call it."""

Forward: TypeAlias = Callable[..., Any]


def names_in_forward(module: nn.Module) -> set[str]:
    """Return the names of functions and attributes that a module's `forward` uses."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set() if code is None else set(code.co_names)


def forward_with(
    module: nn.Module, functions: Mapping[str, Callable[..., Any]]
) -> tuple[Forward, set[str]]:
    """Copy a module's `forward` that calls other functions, and the names of those that it finds.

    `functions` replace the globals of the same names, which they get as their first argument.
    """
    forward: Any = inspect.unwrap(type(module).forward)
    used = names_in_forward(module) & functions.keys() & forward.__globals__.keys()
    changed = {name: partial(functions[name], forward.__globals__[name]) for name in used}
    rest = forward.__name__, forward.__defaults__, forward.__closure__
    copy = FunctionType(forward.__code__, {**forward.__globals__, **changed}, *rest)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(copy, module), used


def fuse_layers(model: nn.Module, operations: Operations, dtype: torch.dtype) -> None:
    """Let norms and gated networks of a loaded model call operations; it is then for inference.

    Args:
        model: its weights may be quantised, or have other dtypes than what its layers pass on.
        operations: compute the same.
        dtype: of what the layers pass on.
    """
    for module in model.modules():
        if len(inspect.signature(module.forward).parameters) != 1:
            continue  # a norm with a gate, for example
        for forward, x in _candidates(module, operations, dtype):
            # Both run without hooks, which may take the last layers' outputs to another device.
            if agrees(forward, module.forward, x):
                module.forward = forward
                break


@dataclass(frozen=True, eq=False)
class FusedNorm:
    """The `forward` of an RMSNorm."""

    operations: Operations
    weight: Tensor  # (size,)
    eps: float
    # The normed sums by the sums of `of_sum`, until the norm is called with them.
    normed: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., size) to (..., size); unchanged if the rotation will norm it."""
        if (normed := self.normed.pop(x, None)) is not None:
            return cast(Tensor, normed)
        context = tree_context()
        if context is not None and self in context.norms:
            return x
        return self.operations.rms_norm(x, self.weight, self.eps)[0]

    def of_sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the sum of two tensors, and keep the normed sum for the next call."""
        normed, total = self.operations.rms_norm(x, self.weight, self.eps, residual)
        self.normed[total] = normed
        return total


def _candidates(
    module: nn.Module, operations: Operations, dtype: torch.dtype
) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Yield functions that may compute what a module does, and its inputs for each."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if isinstance(weight, Tensor) and weight.ndim == 1 and eps is not None:
        x = RandomInputs(weight.device, dtype).draw(1, COMPARED_ROWS, len(weight))
        yield FusedNorm(operations, weight, eps), x
        # Gemma's norms add 1 to their weight, in float32.
        yield FusedNorm(operations, weight.detach().float() + 1, eps), x
    parts: list[Any] = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    gate, up, down = parts
    activation: Any = getattr(module, "act_fn", None)
    if activation is not None and all(isinstance(x, nn.Module) for x in parts):
        weight = getattr(gate, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            # Weights of 8 bits are floating-point numbers too, but not what layers pass on.
            x = RandomInputs(weight.device, dtype).draw(1, COMPARED_ROWS, weight.shape[1])
            for name, function in ACTIVATIONS.items():
                if agrees(activation, function, POINTS, tolerance=SAME_FUNCTION):
                    gated = partial(operations.gated, activation=name)
                    yield partial(_feed_forward, gate, up, down, gated), x


def _feed_forward(gate: Forward, up: Forward, down: Forward, gated: Forward, x: Tensor) -> Tensor:
    output: Tensor = down(gated(gate(x), up(x)))
    return output


def fuse_rotation(model: nn.Module, run: Callable[[], object]) -> None:
    """Let attention layers norm, rotate and store by one operation in passes over trees.

    `run` runs a tree through the model, on which each layer is compared with itself.
    """
    layers = {
        module: RotatingLayer(module)
        for module in model.modules()
        if ROTARY in names_in_forward(module) and "forward" not in vars(module)
    }
    _replace_agreeing(layers, run)


def _replace_agreeing(
    layers: Mapping[nn.Module, RotatingLayer | AddingLayer], run: Callable[[], object]
) -> None:
    """Replace the `forward` of each module whose layer agrees with it on the tree of `run`."""
    for module, layer in layers.items():
        module.forward = layer.compare
    try:
        if layers:
            run()
    except UnsupportedModelError:  # the target has no passes over trees
        return
    finally:
        for module, layer in layers.items():
            del module.forward
            if layer.agrees:
                module.forward = layer


class RotatingLayer:
    """The `forward` of an attention layer whose rotation `TreeContext.rotate` takes over."""

    def __init__(self, module: nn.Module) -> None:
        self.plain: Forward = module.forward
        self.rotating, _ = forward_with(module, {ROTARY: _rotate})
        self.norms: Sequence[FusedNorm] = ()
        self.has_halves = False  # see `TreeContext`
        self.agrees = False  # whether it computes the plain queries and keys
        norms = [getattr(getattr(module, x, None), "forward", None) for x in ("q_norm", "k_norm")]
        found = [x for x in norms if isinstance(x, FusedNorm)]
        if len(found) == 2 and found[0].eps == found[1].eps:
            self.norms = found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = tree_context()
        if context is None:
            return self.plain(*args, **kwargs)
        context.norms, context.has_halves = self.norms, self.has_halves
        try:
            return self.rotating(*args, **kwargs)
        finally:
            context.norms, context.has_halves = (), False

    def compare(self, *args: Any, **kwargs: Any) -> Any:
        """Return the plain layer's output, and find out whether this layer computes the same."""
        context = tree_context()
        assert context is not None
        output, expected = _watch(context, self.plain, args, kwargs)

        def compare() -> bool:
            _, actual = _watch(context, self, args, kwargs)
            pairs = zip(actual, expected, strict=True)
            return bool(actual) and all(_close(x, y, limit) for (x, limit), (y, _) in pairs)

        for has_halves, norms in product((False, True), (self.norms, ())):
            self.has_halves, self.norms = has_halves, norms
            self.agrees = _holds(compare)
            if self.agrees:
                break
            context.drop_rotation()
        return output


def fuse_residuals(
    layers: Sequence[nn.Module], last: nn.Module | None, run: Callable[[], object]
) -> None:
    """Let layers add a sublayer's output and norm the sum by one operation, in passes over trees.

    Args:
        layers: of the decoder, whose norms and attention have been replaced.
        last: the norm after them.
        run: runs a tree through the model, on which each layer is compared with itself.
    """
    norms = [getattr(layer, "input_layernorm", None) for layer in layers[1:]]
    found: dict[nn.Module, AddingLayer] = {}
    for layer, following in zip(layers, [*norms, last], strict=True):
        between, after = (
            getattr(x, "forward", None)
            for x in (getattr(layer, "post_attention_layernorm", None), following)
        )
        parts = [getattr(layer, name, None) for name in ("input_layernorm", "self_attn", "mlp")]
        is_known = None not in parts and "forward" not in vars(layer)
        if is_known and isinstance(between, FusedNorm) and isinstance(after, FusedNorm):
            found[layer] = AddingLayer(layer, after)
    _replace_agreeing(found, run)


class AddingLayer:
    """The `forward` of a pre-norm layer whose two sums are normed as they are added."""

    def __init__(self, module: Any, after: FusedNorm) -> None:
        self.module = module
        self.plain: Forward = module.forward
        self.after = after  # the first norm of the next layer
        self.agrees = False  # whether it computes what the plain layer does

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tree_context() is None or args:  # features of images may be added between layers
            return self.plain(x, *args, **kwargs)
        module = self.module
        attended, _ = module.self_attn(hidden_states=module.input_layernorm(x), **kwargs)
        x = module.post_attention_layernorm.forward.of_sum(attended, x)
        output = module.mlp(module.post_attention_layernorm(x))
        if isinstance(output, tuple):  # experts also return their router's scores
            output = output[0]
        return self.after.of_sum(output, x)

    def compare(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the plain layer's output, and find out whether this layer computes the same."""
        output = self.plain(x, *args, **kwargs)

        def compare() -> bool:
            actual = self(x, *args, **kwargs)
            # Beside what a layer passes on, its own part may be small.
            pairs = (actual - x, output - x), (self.after(actual), self.after(output))
            return all(_close(mine, its, TOLERANCES[x.dtype]) for mine, its in pairs)

        self.agrees = _holds(compare)
        return output


def _holds(compare: Callable[[], bool]) -> bool:
    """Return the result of a comparison; False if the code of a model cannot run in this way."""
    try:
        return compare()
    except Exception as error:
        if is_out_of_memory(error) or is_device_lost(error):
            raise
        return False


def _rotate(
    original: Forward, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Run in place of `ROTARY`, to which most models give these arguments."""
    context = tree_context()
    assert context is not None
    return context.rotate(query, key, cos, sin)


def _watch(
    context: TreeContext, forward: Forward, args: Any, kwargs: Any
) -> tuple[Any, list[tuple[Tensor, float]]]:
    """Run an attention layer: its output, queries and stored keys, with their tolerances."""
    seen: list[tuple[Tensor, float]] = []
    operations = context.operations

    def tree_attention(q: Tensor, k: Tensor, v: Tensor, keys: VisibleKeys, **kwargs: Any) -> Tensor:
        stored = k.index_select(1, context.cache.slots.to(k.device))
        seen.append((q, TOLERANCES[q.dtype]))
        if stored.dtype == torch.int8:
            seen.append((dequantise(stored, q.dtype), QUANTISED_TOLERANCE))
        else:
            seen.append((stored, TOLERANCES[q.dtype]))
        return operations.tree_attention(q, k, v, keys, **kwargs)

    context.operations = replace(operations, tree_attention=tree_attention)
    try:
        return forward(*args, **kwargs), seen
    finally:
        context.operations = operations


@torch.inference_mode()
def agrees(forward: Forward, plain: Forward, *inputs: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Return whether two functions compute the same; False if either cannot run alone."""

    def compare() -> bool:
        actual, expected = forward(*inputs), plain(*inputs)
        return actual.dtype == expected.dtype and _close(actual, expected, tolerance)

    return _holds(compare)


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether the root mean square difference is below a share of the expected numbers'."""
    actual, expected = actual.float(), expected.float()
    difference = (actual - expected).square().mean().sqrt()
    return float(difference) <= tolerance * float(expected.square().mean().sqrt())
