"""The drafter in training: many blocks of many texts in one forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters import dflash2, markov, treeflash
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.training.batch import Batch
from treeflash_cuda.training.block_attention import block_attention
from treeflash_cuda.training.heads import Head, Marginal, trained_head
from treeflash_cuda.training.lm_head import LMHead, Shortlist, in_chunks


class Prediction(NamedTuple):
    """What the drafter says of n tokens.

    Attributes:
        log_probs: (n, w) nats of the tokens that were asked for.
        best: (n,) nats of its most probable token.
    """

    log_probs: Tensor
    best: Tensor


class Blocks(nn.Module):
    """A drafter and its conditional head as one module.

    All of training goes through `forward`, as wrappers for several processes need.
    """

    def __init__(
        self, model: DrafterModel, head: nn.Module | None, embeddings: Tensor, lm_head: LMHead
    ) -> None:
        """Add the target's embeddings and output head, which are not trained."""
        super().__init__()
        self.model = model
        # In a list, so that they are neither moved nor saved.
        self.embeddings = [embeddings]
        self.lm_head = [lm_head]
        self.head: list[Head] = []
        if head is not None:
            self.add_module(head_prefix(model.config).removesuffix("."), head)
            self.head.append(trained_head(head, model.config, model.norm, embeddings, lm_head))

    def hidden(self, batch: Batch) -> Tensor:
        """(rows, A, D, hidden_size) outputs of the last layer at the slots that predict."""
        config = self.model.config
        rows, anchors = batch.anchors.shape
        size, device = config.block_size, batch.tokens.device
        length = batch.tokens.shape[1]
        features = batch.features.to(self.model.fc.weight.dtype)
        context = self.model.project(features)
        positions = (batch.anchors[:, :, None] + torch.arange(size, device=device)).flatten(1)
        columns = torch.arange(length, device=device).expand(rows, -1)
        rotation = self._rotation(torch.cat([columns, positions], 1))
        tokens = torch.full((rows, anchors, size), config.mask_token_id, device=device)
        tokens[:, :, 0] = batch.tokens.gather(1, batch.anchors)
        x = F.embedding(tokens.flatten(1), self.embeddings[0]) * config.input_scale
        kinds = list(zip(config.sliding_windows, config.causal, strict=True))
        attention = {
            kind: block_attention(batch.anchors, size, length, *kind) for kind in set(kinds)
        }
        for layer, kind in zip(self.model.layers, kinds, strict=True):
            x = layer(x, context, rotation, attention[kind])
        return x.unflatten(1, (anchors, size))[:, :, config.first_slot :]

    def forward(
        self, batch: Batch, wanted: Tensor | None = None, shortlist: Shortlist | None = None
    ) -> tuple[Prediction, Prediction | None] | Tensor:
        """Predict the n tokens of a batch, or draft blocks.

        Args:
            batch: its anchors are the roots.
            wanted: (n, w) the tokens to give log probabilities of; None drafts.
            shortlist: contains all of `wanted`; None is the whole vocabulary.

        Returns:
            The predictions without and with the previous token; the latter is None if the drafter
            has no head. If it drafts: (rows, A, D) the chain of its best tokens.
        """
        hidden = self.hidden(batch)
        if wanted is None:
            return self._draft(hidden, batch.tokens.gather(1, batch.anchors))
        hidden = hidden[batch.valid]
        normed = self.model.norm(hidden)
        previous = batch.previous()
        index = wanted if shortlist is None else shortlist.index[wanted]
        marginal, *rest = (
            self._predict(head, hidden, normed, previous, index, shortlist)
            for head in (Marginal(self.lm_head[0]), *self.head)
        )
        return marginal, rest[0] if rest else None

    def _predict(
        self,
        head: Head,
        hidden: Tensor,
        normed: Tensor,
        previous: Tensor,
        index: Tensor,
        shortlist: Shortlist | None,
    ) -> Prediction:
        def predict(queries: Tensor, normed: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            log_probs = head.log_probs(queries, normed, shortlist)
            return log_probs.gather(1, index), log_probs.detach().amax(-1)

        queries = head.queries(hidden, normed, previous)
        return Prediction(*in_chunks(predict, (queries, normed, index), self._width(shortlist)))

    def _draft(self, hidden: Tensor, roots: Tensor) -> Tensor:
        """(rows, A, D) tokens, each the best after the one before it."""
        head = self.head[0] if self.head else Marginal(self.lm_head[0])

        def best(queries: Tensor, normed: Tensor) -> tuple[Tensor]:
            return (head.log_probs(queries, normed, None).argmax(-1),)

        chain = [roots.flatten()]
        for slot in hidden.flatten(0, 1).unbind(1):
            normed = self.model.norm(slot)
            queries = head.queries(slot, normed, chain[-1])
            chain += in_chunks(best, (queries, normed), self._width(None))
        return torch.stack(chain[1:], -1).view(*roots.shape, -1)

    def _width(self, shortlist: Shortlist | None) -> int:
        return len(self.lm_head[0].weight if shortlist is None else shortlist.tokens)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, 1, n, head_dim) each."""
        cos, sin = self.model.rotary(positions, torch.float32)
        return cos[:, None], sin[:, None]


def head_prefix(config: DrafterConfig) -> str:
    """Of the names of the head's tensors in a checkpoint."""
    if config.head == "selector":
        return dflash2.HEAD_PREFIX
    return markov.HEAD_PREFIX if config.head in markov.HEADS else treeflash.HEAD_PREFIX
