"""The target at work on one text."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding.tree import DraftTree
from treeflash_mlx.cache import release_freed_memory
from treeflash_mlx.drafter import DrafterModel
from treeflash_mlx.sampler import choose
from treeflash_mlx.target import Target
from treeflash_mlx.tree_hooks import TreePass

PREFILL_CHUNK = 512
"""Prompt tokens per forward pass."""
RELEASE_INTERVAL = 256
"""Committed tokens between two releases of freed memory."""


class Verifier:
    """`treeflash.decoding.interfaces.TreeVerifier` in MLX."""

    def __init__(self, target: Target, drafter: DrafterModel | None) -> None:
        """Start a text.

        Args:
            target: the loaded model.
            drafter: projects the outputs of its target layers to features; None for no features.
        """
        self.target = target
        self.drafter = drafter
        self.cache = target.new_cache()
        self.length = 0
        self.outputs: mx.array | None = None

    def prefill(
        self,
        token_ids: Sequence[int],
        sampling: SamplingConfig,
        uniforms: NDArray[np.float64] | None,
    ) -> tuple[int, mx.array | None]:
        """See `TreeVerifier.prefill`."""
        tokens = mx.array(list(token_ids), mx.int32)
        last = len(token_ids) - 1
        features = []
        for first in range(0, last, PREFILL_CHUNK):
            # The last token has a separate pass: only it needs logits.
            _, part = self._prefill(tokens[first : min(first + PREFILL_CHUNK, last)])
            mx.eval([cache.state for cache in self.cache], part)
            features.append(part)
            if first:
                release_freed_memory()
        logits, part = self._prefill(tokens[last:])
        features.append(part)
        chosen = choose(logits, sampling, uniforms)
        if self.drafter is None:
            return int(chosen[0]), None
        whole = mx.concatenate(features)
        mx.async_eval(whole)
        return int(chosen[0]), whole

    def verify(
        self,
        tree: DraftTree,
        sampling: SamplingConfig,
        uniforms: NDArray[np.float64] | None,
    ) -> NDArray[np.int32]:
        """See `TreeVerifier.verify`."""
        return choose(self._tree_logits(tree), sampling, uniforms)

    def commit(self, path: NDArray[np.int32]) -> mx.array | None:
        """See `TreeVerifier.commit`."""
        for cache in self.cache:
            cache.commit(self.length, path)
        before, self.length = self.length, self.length + len(path)
        features = None
        if self.drafter is not None and self.outputs is not None:
            features = self.drafter.project(self.outputs[mx.array(path)])
        # The device moves the rows while Python builds the next draft.
        mx.async_eval([cache.state for cache in self.cache], features)
        if before // RELEASE_INTERVAL != self.length // RELEASE_INTERVAL:
            release_freed_memory()
        return features

    def logits(self, tree: DraftTree) -> NDArray[np.float32]:
        """See `TreeVerifier.logits`."""
        return np.array(self._tree_logits(tree).astype(mx.float32))

    def keys_values(self) -> NDArray[np.float32]:
        """See `TreeVerifier.keys_values`."""
        self._drop_tree()
        return np.array(
            mx.stack([mx.stack(cache.read())[:, 0].astype(mx.float32) for cache in self.cache])
        )

    def close(self) -> None:
        """See `TreeVerifier.close`."""
        self.cache, self.outputs = self.target.new_cache(), None

    def _drop_tree(self) -> None:
        """Drop the rows of a tree that was not committed."""
        for cache in self.cache:
            cache.offset = self.length

    def _prefill(self, tokens: mx.array) -> tuple[mx.array, mx.array | None]:
        """(n, vocab) logits and (n, hidden_size) features of the next tokens."""
        logits, outputs = self._forward(tokens, None)
        self.length += tokens.shape[0]
        # Projected at once: the outputs of five layers take five times the memory.
        if self.drafter is None or outputs is None:
            return logits, None
        return logits, self.drafter.project(outputs)

    def _tree_logits(self, tree: DraftTree) -> mx.array:
        logits, self.outputs = self._forward(mx.array(tree.tokens), TreePass.of(tree, self.length))
        return logits

    def _forward(self, tokens: mx.array, tree: TreePass | None) -> tuple[mx.array, mx.array | None]:
        self._drop_tree()
        layer_ids = self.drafter.config.target_layer_ids if self.drafter is not None else ()
        return self.target.forward(tokens, self.cache, layer_ids, tree)
