"""The target and the states of its sequences: forward passes over trees, and commits."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from treeflash.decoding.backend_base import BaseState, OneByOneVerifier
from treeflash.decoding.interfaces import StateArrays
from treeflash.decoding.tree import DraftTree
from treeflash.reference.drafter_model import DrafterModel
from treeflash.reference.hybrid import LayerState
from treeflash.reference.numerics import Array, Ints
from treeflash.reference.target import Cache, NodeOutputs, States, Target


class State(BaseState[Cache, States]):
    """`treeflash.decoding.interfaces.SequenceState` in NumPy."""

    def __init__(self, target: Target, drafter: DrafterModel | None, capacity: int) -> None:
        cache = target.new_cache()
        super().__init__(cache, drafter.new_cache() if drafter else None, cache.start or None)
        self.target, self.drafter_model, self.capacity = target, drafter, capacity

    def copy(self, length: int, capacity: int, recurrent: States | None) -> State:
        new = type(self)(self.target, self.drafter_model, capacity)
        new.kv_cache.copy_from(self.kv_cache, length)
        if recurrent is not None:
            new.restore_recurrent(recurrent)
        if self.drafter and new.drafter:
            new.drafter.copy_from(self.drafter, length)
            new.context = [part.copy() for part in self.context_before(length)]
        return new

    def recurrent_states(self) -> States | None:
        return self.kv_cache.states or None

    def restore_recurrent(self, states: States) -> None:
        self.kv_cache.states = states

    def recurrent_arrays(self) -> Iterable[LayerState]:
        return [x for states in (self.kv_cache.states, *self.snapshots) for x in states.values()]

    def to_host(self, x: Array) -> Array:
        return x.copy()

    def from_host(self, x: Array) -> Array:
        return x

    def export_recurrent(self, states: States) -> StateArrays:
        tails = {f"{n}.tail": state.tail for n, state in states.items()}
        return tails | {f"{n}.matrix": state.matrix for n, state in states.items()}

    def load_recurrent(self, arrays: StateArrays) -> States:
        return {
            n: LayerState(arrays[f"{n}.tail"], arrays[f"{n}.matrix"]) for n in self.kv_cache.start
        }

    def read_recurrent_states(self) -> list[Array]:
        return [x for _, s in sorted(self.kv_cache.states.items()) for x in (s.tail, s.matrix)]


class Verifier(OneByOneVerifier):
    """`treeflash.decoding.interfaces.TreeVerifier` in NumPy."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def forward(self, state: State, tree: DraftTree) -> tuple[Array, NodeOutputs]:
        assert state.length + len(tree) <= state.capacity, "the state is too small"
        return self.target.forward(
            tree.tokens, tree.positions(state.length), tree.ancestor_mask(), state.kv_cache
        )

    def commit_one(self, state: State, outputs: NodeOutputs, path: Ints) -> None:
        state.kv_cache.commit(path)
        state.restore_recurrent({n: states[path[-1]] for n, states in outputs.states.items()})
        if state.drafter_model is not None:
            layers = state.drafter_model.config.target_layer_ids
            features = np.concatenate([outputs.layers[i + 1][path] for i in layers], -1)
            state.context.append(features)
