"""The one-shot drafter (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.config import DrafterConfig
from treeflash.decoding.transitions import TransitionTable
from treeflash.reference.cache import Cache
from treeflash.reference.numerics import (
    Array,
    attention,
    log_softmax,
    rms_norm,
    rotate,
    silu,
    top,
    visible,
)
from treeflash.reference.target import Target


@dataclass(frozen=True, eq=False)
class Block:
    """A drafted block: the root's token id, and (S, hidden_size) outputs of the last layer."""

    root: int
    hidden: Array


@dataclass(frozen=True, eq=False)
class DrafterModel:
    """A drafter's tensors, with the target that it drafts for.

    Attributes:
        config: the drafter's shape.
        tensors: of the backbone, by canonical name.
        head_tensors: of the AR head, by name without `ar_approximation.`.
        target: gives the embeddings and the output head.
    """

    config: DrafterConfig
    tensors: dict[str, Array]
    head_tensors: dict[str, Array]
    target: Target

    def normed(self, name: str, x: Array) -> Array:
        """RMS-normalise with the weights of that name."""
        return rms_norm(x, self.tensors[name + ".weight"], self.config.rms_norm_eps)

    def logits(self, hidden: Array) -> Array:
        """The target's output head over last-layer outputs."""
        return self.target.output_head(self.normed("norm", hidden))


class Drafter:
    """`treeflash.decoding.interfaces.Drafter` in NumPy."""

    def __init__(self, model: DrafterModel) -> None:
        """Start a text."""
        config = model.config
        self.model = model
        self.cache = Cache(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)

    def draft(self, features: Array, root: int) -> Block:
        """See `Drafter.draft`."""
        self.extend(features)
        config, start = self.model.config, self.cache.length
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
            k, v = self.cache.attend(n, *self._keys_values(layer, y, positions))
            x = x + self._linear(layer + "self_attn.o_proj", attention(q, k, v, mask))
            y = self.model.normed(layer + "post_attention_layernorm", x)
            gate = silu(self._linear(layer + "mlp.gate_proj", y))
            up = self._linear(layer + "mlp.up_proj", y)
            x = x + self._linear(layer + "mlp.down_proj", gate * up)
        return Block(root, x)

    def marginals(self, block: Block, k: int, temperature: float) -> TransitionTable:
        """See `Drafter.marginals`."""
        tokens, log_probs = top(self.model.logits(block.hidden[1:]) / temperature, k)
        return TransitionTable.from_marginals(tokens, log_probs)

    def log_probs(self, block: Block) -> Array:
        """See `Drafter.log_probs`."""
        return log_softmax(self.model.logits(block.hidden[1:]))

    def keys_values(self) -> Array:
        """See `Drafter.keys_values`."""
        return self.cache.keys_values()

    def extend(self, features: Array) -> None:
        """See `Drafter.extend`: positions are projected to keys and values once, for all blocks."""
        context = self._project(features)
        rows = np.arange(len(context), dtype=np.int32)
        for n in range(self.model.config.num_hidden_layers):
            k, v = self._keys_values(f"layers.{n}.", context, rows + self.cache.length)
            self.cache.attend(n, k, v)
        self.cache.commit(rows)

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
