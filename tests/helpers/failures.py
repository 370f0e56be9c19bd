"""Functions that fail, and a disk without space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest


@contextmanager
def failing(
    owner: Any, name: str, error: BaseException | type[BaseException], call: int | None = None
) -> Iterator[None]:
    """Let a function of a module, a class or an object raise an error until the block ends.

    Every call raises it; with `call` only the one of this number, from 1 on.
    """
    function, numbers = getattr(owner, name), count(1)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if call in (None, next(numbers)):
            raise error
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


@contextmanager
def full_disk(size: int = 10) -> Iterator[None]:
    """Let no file become larger than `size` bytes until the block ends, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
