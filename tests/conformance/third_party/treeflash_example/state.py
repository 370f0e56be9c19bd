"""The state of one text."""

import numpy as np

from treeflash.decoding.one_by_one import WithoutRecurrence


class State(WithoutRecurrence):
    """Keys and values by layer, and the features that the drafter has not read yet."""

    def __init__(self, cache, drafter_cache, features=()):
        self.cache, self.drafter_cache, self.features = cache, drafter_cache, list(features)

    @property
    def length(self):
        return self.cache[0].shape[2]

    @property
    def nbytes(self):
        return sum(x.nbytes for x in (*self.cache, *(self.drafter_cache or ()), *self.features))

    def fork(self, length, capacity):
        new = State(self.cache, self.drafter_cache, self.features)  # arrays are never changed
        new.truncate(length)
        return new

    def truncate(self, length):
        self.cache = [x[:, :, :length] for x in self.cache]
        if self.drafter_cache is not None:
            read = self.drafter_cache[0].shape[2]
            self.drafter_cache = [x[:, :, :length] for x in self.drafter_cache]
            if self.features:
                features = np.concatenate(self.features)[: max(length - read, 0)]
                self.features = [features] if len(features) else []

    def close(self):
        self.cache = self.drafter_cache = self.pending = self.outputs = None
        self.features = []

    def keys_values(self):
        return np.stack(self.cache)

    def drafter_keys_values(self):
        return np.stack(self.drafter_cache)
