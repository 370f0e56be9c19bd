"""Functions that record their calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest


@contextmanager
def recording(owner: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    """Record the positional arguments of each call of a function until the block ends.

    The owner is a module, a class or an object; the function works as before. Where the owner is a
    class, the arguments begin with the object.
    """
    function, calls = getattr(owner, name), []

    @wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, record)
        yield calls
