"""The memory of a GPU, which all models and sequences of the process share.

MLX allocates whatever it is asked for. Beyond what macOS recommends nothing fails: macOS compresses
and swaps, and a token takes seconds. So the sizes of models and sequences are counted here, and
what does not fit is refused before it is allocated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

from treeflash.config import GIB
from treeflash.errors import MemoryInUseError, MemoryShortError
from treeflash_mlx.device import available_bytes


class SharedMemory:
    """Counts bytes by their owners, as long as these exist; threads may share it.

    `limit` returns the bytes that all may take; None for no limit.
    """

    def __init__(self, limit: Callable[[], int | None]) -> None:
        self.limit = limit
        self._models: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self._sequences: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """What all models and sequences take, bytes."""
        with self._lock:
            return sum(self._models.values()) + sum(self._sequences.values())

    @property
    def models_nbytes(self) -> int:
        with self._lock:
            return sum(self._models.values())

    def add_model(self, model: object, nbytes: int) -> None:
        with self._lock:
            self._models[model] = nbytes

    def add_sequence(self, sequence: object, nbytes: int) -> None:
        """Count the bytes that a sequence may take; raises what `check` does."""
        with self._lock:
            self._check(nbytes)
            self._sequences[sequence] = nbytes

    def drop_sequence(self, sequence: object) -> None:
        with self._lock:
            self._sequences.pop(sequence, None)

    def check(self, nbytes: int) -> None:
        """Raise a MemoryInUseError if no `nbytes` are free for a sequence.

        A MemoryShortError is raised if they would not be free without other sequences either.
        """
        with self._lock:
            self._check(nbytes)

    def _check(self, nbytes: int) -> None:
        if (limit := self.limit()) is None:
            return
        # Models that leave nothing were loaded with `force`.
        left = limit - sum(self._models.values())
        if left <= 0:
            return
        if nbytes > left:
            raise MemoryShortError(
                f"this sequence needs {nbytes / GIB:.2f} GiB for its KV cache, and the models "
                f"leave {left / GIB:.2f} GiB of the GPU's memory; shorten the prompt, lower "
                "max_tokens, or use a smaller model"
            )
        if nbytes > left - sum(self._sequences.values()):
            raise MemoryInUseError(
                f"the {left / GIB:.2f} GiB that the models leave have no room for another "
                f"{nbytes / GIB:.2f} GiB until a sequence ends; decode fewer or shorter texts at "
                "once"
            )


MEMORY = SharedMemory(available_bytes)
