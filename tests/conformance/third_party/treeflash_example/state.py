"""The state of one sequence."""

import numpy as np

from treeflash.decoding.backend_base import BaseState


class KVCache:
    """(2, kv_heads, length, head_dim) keys and values by layer; arrays are never changed."""

    def __init__(self, layers):
        self.layers = layers

    @property
    def length(self):
        return self.layers[0].shape[2]

    @property
    def nbytes(self):
        return sum(x.nbytes for x in self.layers)

    def append(self, layers, rows=slice(None)):
        pairs = zip(self.layers, layers, strict=True)
        self.layers = [np.concatenate([old, new[:, :, rows]], 2) for old, new in pairs]

    def truncate(self, length):
        self.layers = [x[:, :, :length] for x in self.layers]

    def read(self):
        return np.stack(self.layers)

    def close(self):
        self.truncate(0)


class State(BaseState):
    def copy(self, length, capacity, recurrent):
        caches = (cache and KVCache(cache.layers) for cache in (self.kv_cache, self.drafter))
        new = State(*caches)
        new.context = list(self.context)
        new.truncate(length)
        return new
