"""The tensors of one forward pass: sequences, anchors, and the target's distributions.

An anchor is a position of a sequence that plays the root of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Drafts:
    """Blocks that the drafter drafted after some anchors, scored by the target (Draft-OPD)."""

    columns: Tensor  # (C,) the anchors, the same columns in every row
    tokens: Tensor  # (rows, C, D) the drafted tokens
    top_tokens: Tensor  # (rows, C, D, K) the target's top tokens, given the tokens before each
    top_log_probs: Tensor  # (rows, C, D, K) nats


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences and their anchors."""

    tokens: Tensor  # (rows, length) padded with 0
    features: Tensor  # (rows, length, layers * hidden_size) context features
    anchors: Tensor  # (rows, A) positions
    valid: Tensor  # (rows, A, D) bool, whether the sequence has a token at depth index + 1
    top_tokens: Tensor  # (rows, length, K) the target's top tokens after each position
    top_log_probs: Tensor  # (rows, length, K) nats
    drafts: Drafts | None = None  # they replace the continuations of some anchors

    def to(self, device: torch.device) -> Batch:
        """Move the batch, without drafts, to a device; copies from pinned memory do not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """Copy the batch, without drafts, to memory that a GPU can copy from directly."""
        return self._map(Tensor.pin_memory)

    def continuations(self) -> Tensor:
        """Return (rows, A, D) tokens after each anchor; the last one stands beyond the end."""
        return self._blocks(self.tokens, 1)

    def block_tokens(self) -> Tensor:
        """Return the (rows, A, D) tokens to predict, of the sequence or of a draft."""
        tokens = self.continuations()
        if self.drafts is not None:
            tokens[:, self.drafts.columns] = self.drafts.tokens
        return tokens

    def previous_tokens(self) -> Tensor:
        """Return the (n,) token before each of the n tokens to predict."""
        roots = self.tokens.gather(1, self.anchors)[:, :, None]
        return torch.cat([roots, self.block_tokens()[:, :, :-1]], 2)[self.valid]

    def scored(self) -> tuple[Tensor, Tensor]:
        """Return the (n, K + 1) tokens to score, and the target's (n, K) log probabilities.

        The first tokens of a row are the target's top tokens, which have these log probabilities;
        the last one is the token to predict.
        """
        tokens, log_probs = self._blocks(self.top_tokens, 0), self._blocks(self.top_log_probs, 0)
        if self.drafts is not None:
            tokens[:, self.drafts.columns] = self.drafts.top_tokens
            log_probs[:, self.drafts.columns] = self.drafts.top_log_probs
        tokens = torch.cat([tokens, self.block_tokens()[..., None]], -1)
        return tokens[self.valid], log_probs[self.valid]

    def is_drafted(self) -> Tensor:
        """Return the (n,) bool, whether the token to predict belongs to a draft."""
        assert self.drafts is not None
        drafted = torch.zeros_like(self.valid)
        drafted[:, self.drafts.columns] = True
        return drafted[self.valid]

    def rejections(self) -> Tensor:
        """Count the tokens from a draft's first wrong one to this one, (n,); 0 before it."""
        differs = (self.block_tokens() != self.continuations()).cumsum(2) > 0
        return differs.cumsum(2)[self.valid]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        names = [field.name for field in fields(self) if field.name != "drafts"]
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return Batch(**tensors)

    def _blocks(self, x: Tensor, offset: int) -> Tensor:
        """Return the (rows, A, D, ...) elements of (rows, length, ...) after each anchor."""
        depth = torch.arange(self.valid.shape[2], device=x.device) + offset
        positions = (self.anchors[:, :, None] + depth).clamp(max=x.shape[1] - 1)
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        return x[rows, positions]
