"""Tokens in and logits out of a drafter: its own embeddings and output head, or the target's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash.decoding.gumbel import Noise
from treeflash.drafter_config import DrafterConfig
from treeflash_cuda.cache import upload
from treeflash_cuda.gumbel import gumbel
from treeflash_cuda.linear import take
from treeflash_cuda.target import Target


class OwnVocabulary(nn.Module):
    """What a drafter has instead of the target's; each may be missing.

    Attributes:
        embeddings: (vocab, hidden_size).
        lm_head: (Vd, hidden_size).
        token_ids: (Vd,) the target's ids of the tokens that it can propose.
    """

    embeddings: Tensor | None
    lm_head: Tensor | None
    token_ids: Tensor | None

    def __init__(self, own: Mapping[str, Tensor], target: Target) -> None:
        """Take `embed_tokens.weight`, `lm_head.weight` and `d2t`, if they are not the target's."""
        super().__init__()
        shared = {
            "embed_tokens.weight": target.embeddings,
            "lm_head.weight": target.lm_head_weight,
        }
        kept = {
            name: tensor.to(target.device, target.dtype if name in shared else None)
            for name, tensor in own.items()
        }
        for name, theirs in shared.items():
            if name in kept and theirs is not None and torch.equal(kept[name], theirs):
                del kept[name]
        offsets = kept.get("d2t")
        ids = None if offsets is None else offsets + torch.arange(len(offsets)).to(offsets)
        self.register_buffer("embeddings", kept.get("embed_tokens.weight"), persistent=False)
        self.register_buffer("lm_head", kept.get("lm_head.weight"), persistent=False)
        self.register_buffer("token_ids", ids, persistent=False)


class OutputStage:
    """The embeddings, output head, factor, softcap and token map that a drafter uses."""

    def __init__(self, config: DrafterConfig, own: OwnVocabulary, target: Target) -> None:
        """Hold them."""
        self.config = config
        self.own = own
        self.target = target

    def embed(self, tokens: Tensor) -> Tensor:
        """(..., hidden_size) rows of the input table, from (...) tokens of the target."""
        own = self.own.embeddings
        return self.target.embed(tokens) if own is None else F.embedding(tokens, own)

    def logits(self, normed: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(n, Vd) logits of normalised outputs; (n, v) of the drafter's (v,) tokens if given."""
        own = self.own.lm_head
        if own is not None:
            logits = F.linear(normed, own if tokens is None else take(own, tokens))
        elif tokens is None:
            logits = self.target.output_head(normed)
        else:
            logits = self.target.shortlist_logits(normed, tokens)
        if self.config.output_multiplier != 1:
            logits = logits.float() * self.config.output_multiplier
        if (cap := self.config.softcap) is not None:
            logits = cap * (logits.float() / cap).tanh()
        return logits

    def upload(self, noise: Noise | None) -> Tensor:
        """(n, 3) int32 keys of noise and the bits of its scales; no rows for no noise."""
        if noise is None:
            return torch.empty((0, 3), dtype=torch.int32, device=self.target.device)
        numbers = np.column_stack([noise.keys.view(np.int32), noise.scales.view(np.int32)])
        return upload(numbers, self.target.device)

    def noise(self, uploaded: Tensor) -> Tensor | None:
        """(n, Vd) to add to logits; None if there is none. See `treeflash.decoding.gumbel`."""
        if not len(uploaded):
            return None
        keys, scales = uploaded[:, :2], uploaded[:, 2:].view(torch.float32)
        noise = gumbel(keys, self.target.vocab_size) * scales
        ids = self.own.token_ids
        return noise if ids is None else noise[:, ids]

    def to_target(self, tokens: Tensor) -> Tensor:
        """The target's ids of the drafter's tokens."""
        ids = self.own.token_ids
        return tokens if ids is None else ids[tokens].to(tokens.dtype)

    def over_target_vocabulary(self, log_probs: Tensor) -> Tensor:
        """(n, vocab) from (n, Vd); tokens that the drafter cannot propose have -inf."""
        ids = self.own.token_ids
        if ids is None:
            return log_probs
        wide = log_probs.new_full((len(log_probs), self.target.vocab_size), -torch.inf)
        return wide.index_copy(1, ids, log_probs)
