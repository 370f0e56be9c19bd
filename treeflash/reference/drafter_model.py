"""The weights of a drafter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.reference.numerics import Array, Ints, gelu_tanh, linear, rms_norm, rotate, silu
from treeflash.reference.target import Cache, Target


@dataclass(frozen=True, eq=False)
class DrafterModel:
    """A drafter's tensors, with the target that it drafts for.

    `tensors` are of the backbone, by canonical name, and `head_tensors` of the conditional head, by
    name without a prefix. `vocabulary` has the drafter's embeddings, output head and token map, as
    far as it has its own; the others are the target's.
    """

    config: Any  # a DrafterConfig; a MtpConfig in a MtpModel
    tensors: dict[str, Array]
    head_tensors: dict[str, Array]
    vocabulary: Mapping[str, NDArray[Any]]
    target: Target

    @cached_property
    def token_ids(self) -> Ints:
        """(Vd,) the target's ids of the tokens that the drafter can propose."""
        offsets = self.vocabulary.get("d2t")
        if offsets is None:
            return np.arange(self.target.vocab_size, dtype=np.int32)
        return np.asarray(np.arange(len(offsets)) + offsets, np.int32)

    def new_cache(self) -> Cache:
        config = self.config
        return Cache(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)

    def normed(self, name: str, x: Array) -> Array:
        return rms_norm(x, self.tensors[name + ".weight"], self.config.rms_norm_eps)

    def linear(self, name: str, x: Array) -> Array:
        return linear(self.tensors, name, x)

    def heads(self, name: str, x: Array, positions: Ints) -> Array:
        """Return the (heads, n, head_dim) of n rows, normed if their heads are, and rotated.

        `x` has the rows' projected queries or keys, with `name` before the name of their norm.
        """
        config = self.config
        y = x.reshape(len(x), -1, config.head_dim)
        if f"{name}_norm.weight" in self.tensors:
            y = self.normed(f"{name}_norm", y)
        return rotate(y.swapaxes(0, 1), positions, config.inv_freq, config.rope_scale)

    def keys_and_values(self, layer: str, x: Array, positions: Ints) -> tuple[Array, Array]:
        """Return the (kv_heads, n, head_dim) each, of n rows."""
        config = self.config
        k = self.linear(f"{layer}self_attn.k_proj", x)
        v = k if config.keys_are_values else self.linear(f"{layer}self_attn.v_proj", x)
        v = v.reshape(len(x), -1, config.head_dim)
        if config.gemma4:
            v = rms_norm(v, np.ones(1, np.float32), config.rms_norm_eps)
        return self.heads(f"{layer}self_attn.k", k, positions), v.swapaxes(0, 1)

    def finish(self, layer: str, attended: Array, x: Array) -> Array:
        """Return a layer's (n, hidden_size) outputs from its attention's, and its residual."""
        if not self.config.gemma4:
            x = x + attended
            y = self.normed(layer + "post_attention_layernorm", x)
            return x + self.feed_forward(layer + "mlp.", y)
        x = x + self.normed(layer + "post_attention_layernorm", attended)
        y = self.normed(layer + "pre_feedforward_layernorm", x)
        y = self.feed_forward(layer + "mlp.", y)
        x = x + self.normed(layer + "post_feedforward_layernorm", y)
        return np.asarray(x * self.tensors[layer + "layer_scalar"])

    def feed_forward(self, network: str, y: Array) -> Array:
        gate = self.linear(network + "gate_proj", y)
        gate = gelu_tanh(gate) if self.config.gemma4 else silu(gate)
        return self.linear(network + "down_proj", gate * self.linear(network + "up_proj", y))

    def embed(self, token_ids: Ints) -> Array:
        """Compute the (..., hidden_size) embeddings of (...) tokens."""
        embeddings = self.vocabulary.get("embed_tokens.weight", self.target.embeddings)
        return np.asarray(embeddings[token_ids])

    def logits(self, hidden: Array) -> Array:
        """Return the (..., Vd) logits of last-layer outputs."""
        return self.output(self.normed("norm", hidden))

    def output(self, normed: Array) -> Array:
        """Compute (..., Vd) logits of normalised outputs: head, then factor, then softcap."""
        logits: Array = normed @ self.vocabulary.get("lm_head.weight", self.target.lm_head).T
        logits = logits * np.float32(self.config.output_multiplier)
        if (cap := self.config.softcap) is not None:
            logits = np.float32(cap) * np.tanh(logits / np.float32(cap))
        return logits

    def over_target_vocabulary(self, log_probs: Array) -> Array:
        """Return (..., vocab) from (..., Vd); tokens that the drafter cannot propose have -inf."""
        if "d2t" not in self.vocabulary:
            return log_probs
        shape = (*log_probs.shape[:-1], self.target.vocab_size)
        wide = np.full(shape, -np.inf, np.float32)
        wide[..., self.token_ids] = log_probs
        return wide
