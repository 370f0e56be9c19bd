"""The weights of a drafter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.reference.numerics import Array, Ints, linear, rms_norm
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
