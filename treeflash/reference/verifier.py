"""The target: forward passes over trees, and commits."""

from __future__ import annotations

import numpy as np

from treeflash.decoding.backend_base import OneByOneVerifier
from treeflash.decoding.tree import DraftTree
from treeflash.reference.numerics import Array, Ints
from treeflash.reference.state import State
from treeflash.reference.target import Target


class Verifier(OneByOneVerifier):
    """`treeflash.decoding.interfaces.TreeVerifier` in NumPy."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def forward(self, state: State, tree: DraftTree) -> Array:
        assert state.length + len(tree) <= state.capacity, "the state is too small"
        logits, state.outputs = self.target.forward(
            tree.tokens, tree.positions(state.length), tree.ancestor_mask(), state.kv_cache
        )
        return logits

    def commit_one(self, state: State, path: Ints) -> None:
        state.kv_cache.commit(path)
        state.keep_tokens(path)
        if state.drafter_model is not None:
            layers = state.drafter_model.config.target_layer_ids
            features = np.concatenate([state.outputs[i + 1][path] for i in layers], -1)
            state.context.append(features)
