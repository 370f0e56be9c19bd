"""Import transformers for a command, without the compiler and distributed tensors.

transformers imports both with its first model: for decorators that only the compiler reads, and for
models that are split between processes. They bring sympy and take most of the time of a short
command. So a command imports transformers beside a package `torch._dynamo` that has the decorators
alone, and lets it believe that PyTorch is built without distributed training, as some builds are.
What is compiled later imports the real package.

Only a process of our own may do this: other programs may use transformers for more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
"""Variables of a process that was started beside others."""


def prepare() -> None:
    """Import what loading a model needs, unless transformers has its models already.

    A version of transformers that needs more of the compiler is imported as it is.
    """
    if "transformers.modeling_utils" in sys.modules or any(x in os.environ for x in LAUNCHED):
        return
    import torch.distributed
    from transformers.utils import is_torch_distributed_available

    distributed: Any = torch.distributed
    is_available = distributed.is_available
    distributed.is_available = lambda: False
    try:
        is_torch_distributed_available()  # transformers keeps the answer
    finally:
        distributed.is_available = is_available
    with suppress(ImportError, AttributeError), _decorators_alone():
        import transformers.masking_utils
        import transformers.modeling_utils  # noqa: F401


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """Return the function: in place of decorators, with or without options, of the compiler."""
    return _unchanged if function is None else function


@contextmanager
def _decorators_alone() -> Iterator[None]:
    """Let modules be decorated for the compiler without importing it."""
    import torch

    if COMPILER in sys.modules:
        yield
        return
    spec = find_spec(COMPILER)
    assert spec is not None
    package: Any = ModuleType(COMPILER)
    package.__path__ = spec.submodule_search_locations
    for decorator in DECORATORS:
        setattr(package, decorator, _unchanged)
    sys.modules[COMPILER] = package
    torch.__dict__["_dynamo"] = package
    try:
        yield
    finally:
        # The real package imports its modules anew, and becomes their parent.
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{COMPILER}.")]:
            del sys.modules[name]
        del torch.__dict__["_dynamo"]
