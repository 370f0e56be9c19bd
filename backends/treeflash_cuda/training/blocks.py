"""The drafter in training: many blocks of many texts in one forward pass."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash_cuda.attention import additive_mask, group_mask, grouped_attention
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.training.losses import TargetRows

GROUP = 8
"""Anchors whose blocks share a row of keys. No block sees another: small groups waste little."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts, and the positions that play the root.

    Attributes:
        tokens: (rows, length) padded with 0.
        features: (rows, length, layers * hidden_size) context features.
        anchors: (rows, A) positions, A a multiple of `GROUP`.
        valid: (rows, A, S - 1) bool, whether the text has a token at depth index + 1.
        top_tokens: (rows, length, K) the target's top tokens after each position.
        top_log_probs: (rows, length, K) nats.
    """

    tokens: Tensor
    features: Tensor
    anchors: Tensor
    valid: Tensor
    top_tokens: Tensor
    top_log_probs: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def predicted(self) -> tuple[Tensor, Tensor]:
        """(n,) rows and (n,) positions of the tokens to predict, anchor by anchor."""
        depth = torch.arange(1, self.valid.shape[2] + 1, device=self.anchors.device)
        rows = torch.arange(len(self.tokens), device=self.anchors.device)[:, None, None]
        positions = self.anchors[:, :, None] + depth
        return rows.expand_as(self.valid)[self.valid], positions[self.valid]

    def target_rows(self) -> TargetRows:
        """The target's distributions of the tokens to predict."""
        row, position = self.predicted()
        return TargetRows(self.top_tokens[row, position - 1], self.top_log_probs[row, position - 1])


class Blocks(nn.Module):
    """A drafter and its AR head as one module."""

    def __init__(self, model: DrafterModel, head: nn.Module | None, embeddings: Tensor) -> None:
        """Add the target's embeddings, which are not trained."""
        super().__init__()
        self.model = model
        self.ar_approximation = head
        self.embeddings = [embeddings]  # in a list, so that it is neither moved nor saved

    def hidden(self, batch: Batch) -> Tensor:
        """(rows, A, S, hidden_size) outputs of the last layer."""
        config = self.model.config
        rows, anchors = batch.anchors.shape
        size, device = config.block_size, batch.tokens.device
        features = batch.features.to(self.model.fc.weight.dtype)
        context = self.model.project(features)
        positions = (batch.anchors[:, :, None] + torch.arange(size, device=device)).flatten(1)
        columns = torch.arange(batch.tokens.shape[1], device=device).expand(rows, -1)
        rotation = self._rotation(torch.cat([columns, positions], 1))
        tokens = torch.full((rows, anchors, size), config.mask_token_id, device=device)
        tokens[:, :, 0] = batch.tokens.gather(1, batch.anchors)
        x = F.embedding(tokens.flatten(1), self.embeddings[0]) * config.input_scale
        for n, layer in enumerate(self.model.layers):
            mask = self._mask(batch, positions, config.sliding_windows[n], config.causal[n])
            x = layer(x, context, rotation, functools.partial(_attend, mask.to(x.dtype)))
        return x.unflatten(1, (anchors, size))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The inputs of the target's output head for the n tokens to predict.

        Returns:
            (n, hidden_size) without and (n, hidden_size) with the previous token; the latter is
            None if the drafter has no AR head. `Batch.predicted` gives the token of each row.
        """
        hidden = self.hidden(batch)[:, :, 1:][batch.valid]
        normed = self.model.norm(hidden)
        if self.ar_approximation is None:
            return normed, None
        row, position = batch.predicted()
        embedded = F.embedding(batch.tokens[row, position - 1], self.embeddings[0])
        correction = self.ar_approximation(embedded, normed, None)
        return normed, self.model.norm(hidden + correction)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, 1, n, head_dim) each."""
        cos, sin = self.model.rotary(positions, torch.float32)
        return cos[:, None], sin[:, None]

    def _mask(self, batch: Batch, positions: Tensor, window: int | None, causal: bool) -> Tensor:
        """(rows * groups, 1, n, length + n) additive: the text before an anchor, and its block."""
        size, device = self.model.config.block_size, positions.device
        columns = torch.arange(batch.tokens.shape[1], device=device)
        anchors = batch.anchors.reshape(-1, GROUP).repeat_interleave(size, 1)[:, :, None]
        positions = positions.reshape(-1, GROUP * size)
        blocks = torch.arange(GROUP * size, device=device) // size
        own = (blocks[:, None] == blocks).expand(len(positions), -1, -1)
        seen = torch.cat([columns < anchors, own], -1)
        if causal or window is not None:
            keys = torch.cat([columns.expand(len(positions), -1), positions], 1)
            distance = positions[:, :, None] - keys[:, None, :]
            if causal:
                seen = seen & (distance >= 0)
            if window is not None:
                seen = seen & (distance.abs() < window)
        return additive_mask(seen, torch.float32)[:, None]


def _attend(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(rows, A * S, heads, head_dim) what the blocks see of their texts and of themselves."""
    rows, groups = len(q), len(mask) // len(q)
    length = k.shape[2] - q.shape[2]

    def grouped(blocks: Tensor) -> Tensor:
        return blocks.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1).to(v.dtype)

    def with_context(both: Tensor) -> Tensor:
        context = both[:, :, :length].to(v.dtype).repeat_interleave(groups, 0)
        return torch.cat([context, grouped(both[:, :, length:])], 2)

    keys, values = with_context(k), with_context(v)
    bias = group_mask(mask.to(v.dtype), q.shape[1] // k.shape[1])
    seen = grouped_attention(grouped(q), keys, values, bias, q.shape[-1] ** -0.5)
    return seen.unflatten(0, (rows, groups)).flatten(1, 2)
