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
from treeflash_cuda.attention import Visibility
from treeflash_cuda.cache import upload
from treeflash_cuda.sampler import choose
from treeflash_cuda.target import Target

FIRST_CHUNK, NEXT_CHUNK = 2048, 1024
"""Tokens of a prompt in a forward; those after the first need a mask, and so are smaller."""


class Verifier:
    """`treeflash.decoding.interfaces.TreeVerifier` in PyTorch."""

    def __init__(self, target: Target, layer_ids: tuple[int, ...]) -> None:
        """Start a text; `layer_ids` are the layers whose outputs are the features, if any."""
        self.target = target
        self.layer_ids = layer_ids
        self.cache = target.new_cache()
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
            logits = self._forward(chunk, Visibility(self.length, positions, None))
            features.append(self.commit(np.arange(len(chunk), dtype=np.int32)))
        chosen = choose(logits, sampling, uniforms)
        return int(chosen[0]), torch.cat(features) if self.layer_ids else None

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
        if not self.layer_ids:
            return None
        rows = upload(path, self.target.device)
        return torch.cat([self.outputs[i].index_select(0, rows) for i in self.layer_ids], -1)

    def keys_values(self) -> NDArray[np.float32]:
        """See `TreeVerifier.keys_values`."""
        return self.cache.key_values.read()

    def _tree_logits(self, tree: DraftTree) -> Tensor:
        positions, mask = tree.positions(self.length), tree.ancestor_mask()
        # One upload for all three.
        packed = upload(np.vstack([tree.tokens, positions, mask]), self.target.device)
        tokens, positions_ = packed[:2].long()
        return self._forward(tokens, Visibility(self.length, positions_, packed[2:].bool()))

    def _forward(self, tokens: Tensor, visibility: Visibility) -> Tensor:
        """Logits of all tokens, or of the last where they are no tree."""
        logits, self.outputs = self.target.forward(
            tokens, visibility, self.cache, last_only=visibility.block is None
        )
        return logits
