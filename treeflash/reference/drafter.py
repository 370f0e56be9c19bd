"""The one-shot drafter (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.one_by_one import OneByOneDrafter
from treeflash.decoding.transitions import TransitionTable
from treeflash.reference.cache import Cache
from treeflash.reference.drafter_model import DrafterModel
from treeflash.reference.numerics import (
    Array,
    attention,
    log_softmax,
    rotate,
    silu,
    top,
    visible,
)
from treeflash.reference.state import State


@dataclass(frozen=True, eq=False)
class Block:
    """A drafted block: the root's token id, and (S, hidden_size) outputs of the last layer."""

    root: int
    hidden: Array


class Drafter(OneByOneDrafter):
    """`treeflash.decoding.interfaces.Drafter` in NumPy."""

    def __init__(self, model: DrafterModel) -> None:
        """Hold the weights."""
        self.model = model

    def draft_one(self, state: State, root: int) -> Block:
        """See `Drafter.draft`."""
        cache = state.drafter
        assert cache is not None
        if len(state.features):
            self._read(cache, state.features)
            state.features = state.features[:0]
        config, start = self.model.config, cache.length
        tokens = np.full(config.block_size, config.mask_token_id)
        tokens[0] = root
        positions = start + np.arange(config.block_size, dtype=np.int32)
        keys = np.arange(start + config.block_size, dtype=np.int32)
        x = self.model.target.embed(tokens) * np.float32(config.input_scale)
        for n in range(config.num_hidden_layers):
            mask = visible(positions, keys, config.sliding_windows[n], config.causal[n])
            layer = f"layers.{n}."
            y = self.model.normed(layer + "input_layernorm", x)
            q = self._heads(layer, "q", y, positions)
            k, v = cache.attend(n, *self._keys_values(layer, y, positions))
            x = x + self._linear(layer + "self_attn.o_proj", attention(q, k, v, mask))
            y = self.model.normed(layer + "post_attention_layernorm", x)
            gate = silu(self._linear(layer + "mlp.gate_proj", y))
            up = self._linear(layer + "mlp.up_proj", y)
            x = x + self._linear(layer + "mlp.down_proj", gate * up)
        return Block(root, x)

    def marginals_one(self, block: Block, k: int, temperature: float) -> TransitionTable:
        """See `Drafter.marginals`."""
        tokens, log_probs = top(self.model.logits(block.hidden[1:]) / temperature, k)
        return TransitionTable.from_marginals(tokens, log_probs)

    def log_probs(self, block: Block) -> Array:
        """See `Drafter.log_probs`."""
        return log_softmax(self.model.logits(block.hidden[1:]))

    def _read(self, cache: Cache, features: Array) -> None:
        """Project positions to keys and values, once for all blocks."""
        context = self._project(features)
        rows = np.arange(len(context), dtype=np.int32)
        for n in range(self.model.config.num_hidden_layers):
            k, v = self._keys_values(f"layers.{n}.", context, rows + cache.length)
            cache.attend(n, k, v)
        cache.commit(rows)

    def _project(self, features: Array) -> Array:
        """(n, hidden_size) context of n positions."""
        return self.model.normed("hidden_norm", self._linear("fc", features))

    def _keys_values(
        self, layer: str, x: Array, positions: NDArray[np.int32]
    ) -> tuple[Array, Array]:
        return self._heads(layer, "k", x, positions), self._heads(layer, "v", x, positions)

    def _heads(self, layer: str, name: str, x: Array, positions: NDArray[np.int32]) -> Array:
        config = self.model.config
        y = self._linear(f"{layer}self_attn.{name}_proj", x).reshape(len(x), -1, config.head_dim)
        if name == "v":
            return y.swapaxes(0, 1)
        y = self.model.normed(f"{layer}self_attn.{name}_norm", y).swapaxes(0, 1)
        return rotate(y, positions, config.inv_freq, config.rope_scale)

    def _linear(self, name: str, x: Array) -> Array:
        tensors = self.model.tensors
        y: Array = x @ tensors[name + ".weight"].T
        return y + tensors[name + ".bias"] if name + ".bias" in tensors else y
