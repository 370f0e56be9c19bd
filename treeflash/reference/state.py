"""The state of one text."""

from __future__ import annotations

import numpy as np

from treeflash.reference.drafter_model import DrafterModel
from treeflash.reference.numerics import Array
from treeflash.reference.target import Target


class State:
    """`treeflash.decoding.text_state.TextState` in NumPy.

    Attributes:
        cache: the target's.
        drafter: the drafter's; None if the text is not drafted for.
        features: (length - drafter.length, ...) of the positions that the drafter has not read.
        outputs: (n, hidden_size) of the embeddings and of each layer, for the tree or tokens that
            were run last.
    """

    def __init__(self, target: Target, drafter: DrafterModel | None, capacity: int) -> None:
        """Start empty."""
        self.target = target
        self.drafter_model = drafter
        self.capacity = capacity
        self.cache = target.new_cache()
        self.drafter = drafter.new_cache() if drafter else None
        self.features = np.zeros((0, drafter.feature_size if drafter else 0), np.float32)
        self.outputs: list[Array] = []

    @property
    def length(self) -> int:
        """See `TextState.length`."""
        return self.cache.length

    @property
    def nbytes(self) -> int:
        """See `TextState.nbytes`."""
        drafter = self.drafter.nbytes if self.drafter else 0
        return self.cache.nbytes + drafter + self.features.nbytes

    @property
    def needs_snapshots(self) -> bool:
        """See `TextState.needs_snapshots`."""
        return bool(self.target.recurrent)

    def snapshot(self) -> None:
        """See `TextState.snapshot`."""
        self.cache.snapshot()

    def restorable(self, length: int) -> int:
        """See `TextState.restorable`."""
        return self.cache.restorable(length)

    def fork(self, length: int, capacity: int) -> State:
        """See `TextState.fork`."""
        new = State(self.target, self.drafter_model, capacity)
        new.cache.copy_from(self.cache, length)
        if self.drafter and new.drafter:
            read = self.drafter.length
            new.drafter.copy_from(self.drafter, length)
            new.features = self.features[: max(length - read, 0)].copy()
        return new

    def truncate(self, length: int) -> None:
        """See `TextState.truncate`."""
        self.cache.truncate(length)
        if self.drafter:
            self.features = self.features[: max(length - self.drafter.length, 0)]
            self.drafter.truncate(length)

    def close(self) -> None:
        """See `TextState.close`."""
        self.truncate(0)

    def keys_values(self) -> Array:
        """See `TextState.keys_values`."""
        return self.cache.keys_values()

    def states(self) -> list[Array]:
        """See `TextState.states`."""
        return self.cache.read_states()

    def drafter_keys_values(self) -> Array:
        """See `TextState.drafter_keys_values`."""
        assert self.drafter is not None
        return self.drafter.keys_values()
