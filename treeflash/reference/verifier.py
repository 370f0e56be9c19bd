"""The target, decoding one text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import choose
from treeflash.decoding.tree import DraftTree
from treeflash.reference.numerics import Array
from treeflash.reference.target import Target


class Verifier:
    """`treeflash.decoding.interfaces.TreeVerifier` in NumPy."""

    def __init__(self, target: Target, layer_ids: tuple[int, ...]) -> None:
        """Start a text; `layer_ids` are the layers whose outputs are the features, if any."""
        self.target = target
        self.layer_ids = layer_ids
        self.cache = target.new_cache()
        self.outputs: list[Array] = []

    @property
    def length(self) -> int:
        """Committed positions."""
        return self.cache.length

    def prefill(
        self,
        token_ids: Sequence[int],
        sampling: SamplingConfig,
        uniforms: NDArray[np.float64] | None,
    ) -> tuple[int, Array | None]:
        """See `TreeVerifier.prefill`."""
        rows = np.arange(len(token_ids), dtype=np.int32)
        causal = np.tril(np.ones((len(rows), len(rows)), np.bool_))
        logits = self._forward(np.array(token_ids, np.int32), rows + self.length, causal)
        chosen = choose(logits[-1:], sampling, uniforms)
        return int(chosen[0]), self.commit(rows)

    def verify(
        self,
        tree: DraftTree,
        sampling: SamplingConfig,
        uniforms: NDArray[np.float64] | None,
    ) -> NDArray[np.int32]:
        """See `TreeVerifier.verify`."""
        return choose(self.logits(tree), sampling, uniforms)

    def logits(self, tree: DraftTree) -> Array:
        """See `TreeVerifier.logits`."""
        return self._forward(tree.tokens, tree.positions(self.length), tree.ancestor_mask())

    def commit(self, path: NDArray[np.int32]) -> Array | None:
        """See `TreeVerifier.commit`."""
        self.cache.commit(path)
        if not self.layer_ids:
            return None
        return np.concatenate([self.outputs[i][path] for i in self.layer_ids], -1)

    def keys_values(self) -> Array:
        """See `TreeVerifier.keys_values`."""
        return self.cache.keys_values()

    def close(self) -> None:
        """See `TreeVerifier.close`."""
        self.cache, self.outputs = self.target.new_cache(), []

    def _forward(
        self, token_ids: NDArray[np.int32], positions: NDArray[np.int32], mask: NDArray[np.bool_]
    ) -> Array:
        logits, self.outputs = self.target.forward(token_ids, positions, mask, self.cache)
        return logits
