"""The target at work on one text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import SamplingConfig
from treeflash.decoding.tree import DraftTree
from treeflash_cuda.attention import AttentionContext
from treeflash_cuda.cache import TreeCache, upload
from treeflash_cuda.drafter import DrafterModel
from treeflash_cuda.sampler import choose
from treeflash_cuda.target import Target

FIRST_CHUNK, NEXT_CHUNK = 2048, 1024
"""Prompt tokens per forward pass; chunks after the first need a mask, and so are smaller."""


class Verifier:
    """`treeflash.decoding.interfaces.TreeVerifier` in PyTorch."""

    def __init__(
        self, target: Target, drafter: DrafterModel | None, cache: TreeCache | None = None
    ) -> None:
        """Start a text.

        Args:
            target: the loaded model.
            drafter: projects the outputs of its target layers to features; None for no features.
            cache: without committed positions; None makes one.
        """
        self.target = target
        self.drafter = drafter
        self.cache = target.new_cache() if cache is None else cache
        self.outputs: dict[int, Tensor] = {}

    @property
    def length(self) -> int:
        """Committed positions."""
        return self.cache.key_values.length

    @torch.inference_mode()
    def prefill(
        self,
        token_ids: Sequence[int],
        sampling: SamplingConfig,
        uniforms: NDArray[np.float64] | None,
    ) -> tuple[int, Tensor | None]:
        """See `TreeVerifier.prefill`."""
        device = self.target.device
        features = []
        ends = [*range(FIRST_CHUNK, len(token_ids), NEXT_CHUNK), len(token_ids)]
        for first, end in pairwise([0, *ends]):
            chunk = torch.tensor(token_ids[first:end], device=device)
            positions = torch.arange(self.length, self.length + len(chunk), device=device)
            logits = self._forward(chunk, AttentionContext(self.length, positions, None))
            features.append(self.commit(np.arange(len(chunk), dtype=np.int32)))
        chosen = choose(logits, sampling, uniforms)
        return int(chosen[0]), torch.cat(features) if self.drafter is not None else None

    @torch.inference_mode()
    def verify(
        self,
        tree: DraftTree,
        sampling: SamplingConfig,
        uniforms: NDArray[np.float64] | None,
    ) -> NDArray[np.int32]:
        """See `TreeVerifier.verify`."""
        return choose(self._tree_logits(tree), sampling, uniforms)

    @torch.inference_mode()
    def logits(self, tree: DraftTree) -> NDArray[np.float32]:
        """See `TreeVerifier.logits`."""
        return self._tree_logits(tree).float().cpu().numpy()

    @torch.inference_mode()
    def commit(self, path: NDArray[np.int32]) -> Tensor | None:
        """See `TreeVerifier.commit`."""
        self.cache.key_values.commit(path)
        if self.drafter is None:
            return None
        rows = upload(path, self.target.device)
        outputs = [
            self.outputs[i].index_select(0, rows) for i in self.drafter.config.target_layer_ids
        ]
        # Projected at once: the outputs of five layers take five times the memory.
        return self.drafter.project(torch.cat(outputs, -1))

    def keys_values(self) -> NDArray[np.float32]:
        """See `TreeVerifier.keys_values`."""
        return self.cache.key_values.read()

    def close(self) -> None:
        """See `TreeVerifier.close`."""
        self.cache, self.outputs = self.target.new_cache(), {}

    def _tree_logits(self, tree: DraftTree) -> Tensor:
        positions, mask = tree.positions(self.length), tree.ancestor_mask()
        # One upload for all three.
        packed = upload(np.vstack([tree.tokens, positions, mask]), self.target.device)
        tokens, positions_ = packed[:2].long()
        return self._forward(tokens, AttentionContext(self.length, positions_, packed[2:].bool()))

    def _forward(self, tokens: Tensor, context: AttentionContext) -> Tensor:
        """Logits of all nodes of a tree, or of the last of consecutive tokens."""
        logits, self.outputs = self.target.forward(
            tokens, context, self.cache, last_only=context.ancestors is None
        )
        return logits
