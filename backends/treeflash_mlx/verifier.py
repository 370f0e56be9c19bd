"""The target at work on one text."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding.tree import DraftTree
from treeflash_mlx.cache import release_freed_memory
from treeflash_mlx.sampler import choose
from treeflash_mlx.target import Target
from treeflash_mlx.tree_hooks import TreePass

PREFILL_CHUNK = 512
RELEASE_INTERVAL = 256  # tokens


class Verifier:
    """`treeflash.decoding.interfaces.TreeVerifier` in MLX."""

    def __init__(self, target: Target, layer_ids: tuple[int, ...]) -> None:
        """Start a text; `layer_ids` are the layers whose outputs are the features, if any."""
        self.target = target
        self.layer_ids = layer_ids
        self.cache = target.new_cache()
        self.length = 0
        self.features: mx.array | None = None

    def prefill(
        self,
        token_ids: Sequence[int],
        sampling: SamplingConfig,
        uniforms: NDArray[np.float64] | None,
    ) -> tuple[int, mx.array | None]:
        """See `TreeVerifier.prefill`."""
        tokens = mx.array(list(token_ids), mx.int32)
        last = len(token_ids) - 1
        parts = []
        for first in range(0, last, PREFILL_CHUNK):
            # The last token goes alone, so that no other has its logits computed.
            parts.append(self._prefill(tokens[first : min(first + PREFILL_CHUNK, last)])[1])
            mx.eval([cache.state for cache in self.cache], parts[-1:])
            if first:
                release_freed_memory()
        logits, features = self._prefill(tokens[last:])
        parts.append(features)
        chosen = choose(logits, sampling, uniforms)
        kept = [part for part in parts if part is not None]
        if not kept:
            return int(chosen[0]), None
        whole = mx.concatenate(kept)
        mx.async_eval(whole)
        return int(chosen[0]), whole

    def verify(
        self,
        tree: DraftTree,
        sampling: SamplingConfig,
        uniforms: NDArray[np.float64] | None,
    ) -> NDArray[np.int32]:
        """See `TreeVerifier.verify`."""
        return choose(self._run(tree), sampling, uniforms)

    def commit(self, path: NDArray[np.int32]) -> mx.array | None:
        """See `TreeVerifier.commit`."""
        for cache in self.cache:
            cache.commit(self.length, path)
        before, self.length = self.length, self.length + len(path)
        features = None if self.features is None else self.features[mx.array(path)]
        # The device moves the rows while Python writes down the next draft.
        mx.async_eval([cache.state for cache in self.cache], features)
        if before // RELEASE_INTERVAL != self.length // RELEASE_INTERVAL:
            release_freed_memory()
        return features

    def logits(self, tree: DraftTree) -> NDArray[np.float32]:
        """See `TreeVerifier.logits`."""
        return np.array(self._run(tree).astype(mx.float32))

    def keys_values(self) -> NDArray[np.float32]:
        """See `TreeVerifier.keys_values`."""
        self._forget()
        return np.array(
            mx.stack([mx.stack(cache.read())[:, 0].astype(mx.float32) for cache in self.cache])
        )

    def close(self) -> None:
        """See `TreeVerifier.close`."""
        self.cache, self.features = self.target.new_cache(), None

    def _forget(self) -> None:
        """Drop the rows of a tree that was not committed."""
        for cache in self.cache:
            cache.offset = self.length

    def _prefill(self, tokens: mx.array) -> tuple[mx.array, mx.array | None]:
        self._forget()
        logits, features = self.target.forward(tokens, self.cache, self.layer_ids)
        self.length += tokens.shape[0]
        return logits, features

    def _run(self, tree: DraftTree) -> mx.array:
        self._forget()
        logits, self.features = self.target.forward(
            mx.array(tree.tokens),
            self.cache,
            self.layer_ids,
            TreePass.of(tree, self.length),
        )
        return logits
