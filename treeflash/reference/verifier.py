"""The target: forward passes over trees, and commits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.one_by_one import OneByOneVerifier
from treeflash.decoding.tree import DraftTree
from treeflash.reference.numerics import Array
from treeflash.reference.state import State
from treeflash.reference.target import Target


class Verifier(OneByOneVerifier):
    """`treeflash.decoding.interfaces.TreeVerifier` in NumPy."""

    def __init__(self, target: Target) -> None:
        """Hold the weights."""
        self.target = target

    def forward(self, state: State, tree: DraftTree) -> Array:
        """See `OneByOneVerifier.forward`."""
        assert state.length + len(tree) <= state.capacity, "the state is too small"
        logits, state.outputs = self.target.forward(
            tree.tokens, tree.positions(state.length), tree.ancestor_mask(), state.cache
        )
        return logits

    def commit_one(self, state: State, path: NDArray[np.int32]) -> None:
        """See `OneByOneVerifier.commit_one`."""
        state.cache.commit(path)
        if state.drafter_model is not None:
            layers = state.drafter_model.config.target_layer_ids
            features = np.concatenate([state.outputs[i + 1][path] for i in layers], -1)
            state.features = np.concatenate([state.features, features])
