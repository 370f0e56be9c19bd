"""Tokens in and logits out of a drafter: its own embeddings and output head, or the target's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx import nn

from treeflash.decoding.gumbel import Noise
from treeflash.drafter_config import DrafterConfig
from treeflash_mlx.gumbel import gumbel
from treeflash_mlx.target import Target, shortlist_logits


class OwnVocabulary(nn.Module):
    """What a drafter has instead of the target's; each may be missing.

    Attributes:
        embed_tokens: (vocab, hidden_size) weights.
        lm_head: (Vd, hidden_size) weights.
    """

    embed_tokens: nn.Embedding | None
    lm_head: nn.Linear | None

    def __init__(self, own: Mapping[str, mx.array], target: Target) -> None:
        """Take `embed_tokens.weight`, `lm_head.weight` and `d2t`, if they are not the target's."""
        super().__init__()
        self.embed_tokens = self.lm_head = None
        embeddings, head = own.get("embed_tokens.weight"), own.get("lm_head.weight")
        if embeddings is not None and differs(embeddings, target.embedding):
            self.embed_tokens = nn.Embedding(*embeddings.shape)
            self.embed_tokens.weight = embeddings.astype(target.dtype)
        if head is not None and differs(head, target.output_module):
            self.lm_head = nn.Linear(*head.shape[::-1], bias=False)
            self.lm_head.weight = head.astype(target.dtype)
        offsets = own.get("d2t")
        ids = None if offsets is None else offsets + mx.arange(len(offsets), dtype=offsets.dtype)
        self._token_ids = None if ids is None else ids.astype(mx.int32)

    @property
    def token_ids(self) -> mx.array | None:
        """(Vd,) int32 the target's ids of the tokens that it can propose; None for all."""
        return self._token_ids


class OutputStage:
    """The embeddings, output head, factor, softcap and token map that a drafter uses."""

    def __init__(self, config: DrafterConfig, own: OwnVocabulary, target: Target) -> None:
        """Hold them."""
        self.config = config
        self.own = own
        self.target = target

    def embed(self, tokens: mx.array) -> mx.array:
        """(..., hidden_size) rows of the input table, from (...) tokens of the target."""
        own = self.own.embed_tokens
        rows: mx.array = self.target.embed(tokens) if own is None else own(tokens)
        return rows

    def logits(self, normed: mx.array, tokens: mx.array | None = None) -> mx.array:
        """(..., n, Vd) logits of normalised outputs; (..., n, v) of the drafter's (..., v) tokens.

        In float32 if there is a factor or a softcap.
        """
        own = self.own.lm_head
        if tokens is not None:
            module = self.target.output_module if own is None else own
            logits = shortlist_logits(module, normed, tokens)
        else:
            logits = self.target.output_head(normed) if own is None else own(normed)
        if self.config.output_multiplier != 1:
            logits = logits.astype(mx.float32) * self.config.output_multiplier
        if (cap := self.config.softcap) is not None:
            logits = cap * mx.tanh(logits.astype(mx.float32) / cap)
        return logits

    def noise(self, noise: Noise) -> mx.array:
        """(n, Vd) to add to logits."""
        added = gumbel(noise.keys, self.target.vocab_size) * mx.array(noise.scales)[:, None]
        ids = self.own.token_ids
        return added if ids is None else added[:, ids]

    def to_target(self, tokens: mx.array) -> mx.array:
        """The target's ids of the drafter's tokens."""
        ids = self.own.token_ids
        return tokens if ids is None else ids[tokens]

    def over_target_vocabulary(self, log_probs: mx.array) -> mx.array:
        """(n, vocab) from (n, Vd); tokens that the drafter cannot propose have -inf."""
        ids = self.own.token_ids
        if ids is None:
            return log_probs
        wide = mx.full((len(log_probs), self.target.vocab_size), -mx.inf)
        wide[:, ids] = log_probs
        return wide


def differs(weight: mx.array, module: Any) -> bool:
    """Whether a weight is not that of a module of the target, as far as its dtype can tell."""
    theirs: mx.array = module.weight
    return not mx.array_equal(weight.astype(theirs.dtype), theirs).item()
