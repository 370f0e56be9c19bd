"""What one forward pass trains on: texts, the roots of blocks in them, and the target's answer."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from treeflash_cuda.training.losses import TargetRows


@dataclass(frozen=True, eq=False)
class Drafts:
    """Blocks that the drafter drafted after some anchors, scored by the target (Draft-OPD).

    Attributes:
        columns: (C,) the anchors, the same columns in every row.
        tokens: (rows, C, D) the drafted tokens.
        top_tokens: (rows, C, D, K) the target's top tokens at each, given those before it.
        top_log_probs: (rows, C, D, K) nats.
    """

    columns: Tensor
    tokens: Tensor
    top_tokens: Tensor
    top_log_probs: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts, and the positions that play the root.

    Attributes:
        tokens: (rows, length) padded with 0.
        features: (rows, length, layers * hidden_size) context features.
        anchors: (rows, A) positions.
        valid: (rows, A, D) bool, whether the text has a token at depth index + 1.
        top_tokens: (rows, length, K) the target's top tokens after each position.
        top_log_probs: (rows, length, K) nats.
        drafts: that take the place of the text after some anchors.
    """

    tokens: Tensor
    features: Tensor
    anchors: Tensor
    valid: Tensor
    top_tokens: Tensor
    top_log_probs: Tensor
    drafts: Drafts | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch, without drafts, on a device; copies from pinned memory do not wait."""
        names = [field.name for field in fields(self) if field.name != "drafts"]
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in names))

    def pin(self) -> Batch:
        """The batch in memory that a GPU can copy from directly."""
        names = [field.name for field in fields(self) if field.name != "drafts"]
        return Batch(*(getattr(self, name).pin_memory() for name in names))

    def following(self) -> Tensor:
        """(rows, A, D) the text after each anchor; where it has ended, its last token."""
        return self._after_anchors(self.tokens, 1)

    def block_tokens(self) -> Tensor:
        """(rows, A, D) the tokens to predict: those of the text, or of a draft."""
        tokens = self.following()
        if self.drafts is not None:
            tokens[:, self.drafts.columns] = self.drafts.tokens
        return tokens

    def previous(self) -> Tensor:
        """(n,) the tokens before those to predict."""
        roots = self.tokens.gather(1, self.anchors)[:, :, None]
        return torch.cat([roots, self.block_tokens()[:, :, :-1]], 2)[self.valid]

    def target_rows(self) -> TargetRows:
        """The target's distributions of the n tokens to predict."""
        tokens, log_probs = (
            self._after_anchors(top, 0) for top in (self.top_tokens, self.top_log_probs)
        )
        if self.drafts is not None:
            tokens[:, self.drafts.columns] = self.drafts.top_tokens
            log_probs[:, self.drafts.columns] = self.drafts.top_log_probs
        return TargetRows(
            tokens[self.valid], log_probs[self.valid], self.block_tokens()[self.valid]
        )

    def drafted(self) -> Tensor:
        """(n,) bool, whether the token is of a draft."""
        drafted = torch.zeros_like(self.valid)
        if self.drafts is not None:
            drafted[:, self.drafts.columns] = True
        return drafted[self.valid]

    def rejections(self) -> Tensor:
        """(n,) how many tokens of the block, this one included, follow the text no longer."""
        differs = (self.block_tokens() != self.following()).cumsum(2) > 0
        return differs.cumsum(2)[self.valid]

    def _after_anchors(self, x: Tensor, offset: int) -> Tensor:
        """(rows, A, D, ...) the elements of (rows, length, ...) from `offset` after each anchor."""
        depth = torch.arange(self.valid.shape[2], device=x.device) + offset
        positions = (self.anchors[:, :, None] + depth).clamp(max=x.shape[1] - 1)
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        return x[rows, positions]
