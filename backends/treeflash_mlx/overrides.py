"""Methods of one module of a model, in place of its class's: no other module changes.

The module gets a class of its own, and keeps its parameters and its place in the tree of modules.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from mlx import nn


def override(module: nn.Module, methods: Mapping[str, Callable[..., Any]]) -> None:
    """Give a module these methods, by name."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), dict(methods))


def route_calls(module: nn.Module, call: Callable[..., Any]) -> None:
    """Route the calls of a module through `call(base_call, module, ...)`."""
    base = type(module).__call__
    override(module, {"__call__": lambda self, *a, **k: call(base, self, *a, **k)})


def rebind(
    module: nn.Module, functions: Mapping[str, Callable[..., Any]], current: Callable[[], Any]
) -> set[str]:
    """Let the methods of a module call other functions in a pass over trees.

    A method looks up the functions it calls among the globals of its Python module. The module's
    own methods have the same code, with other functions among their globals: mlx-lm has no registry
    of recurrences, and calls of our own would copy the mixers of a dozen model types.
    The functions, by the names that they stand for, get what `current` returns before the other
    arguments, and may return NotImplemented. `current` returns what the pass that is being built
    has for them; None if it is not over trees. The names of the functions that the module calls are
    returned.
    """
    methods: dict[str, Any] = {}
    names: set[str] = set()
    for base in reversed(type(module).__mro__):
        for name, method in vars(base).items():
            if not isinstance(method, types.FunctionType):
                continue
            scope = method.__globals__
            if not (called := functions.keys() & scope.keys() & set(method.__code__.co_names)):
                continue
            replaced = {key: _dispatch(scope[key], functions[key], current) for key in called}
            code, defaults, closure = method.__code__, method.__defaults__, method.__closure__
            copy = types.FunctionType(code, {**scope, **replaced}, name, defaults, closure)
            copy.__kwdefaults__ = method.__kwdefaults__
            methods[name] = copy
            names |= called
    if methods:
        override(module, methods)
    return names


def _dispatch(
    original: Callable[..., Any], over_trees: Callable[..., Any], current: Callable[[], Any]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if (trees := current()) is None:
            return original(*args, **kwargs)
        result = over_trees(trees, *args, **kwargs)
        return original(*args, **kwargs) if result is NotImplemented else result

    return call
