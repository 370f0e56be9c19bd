"""The AR head, which conditions a block on previous tokens (TreeFlash, section 3)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.config import DrafterConfig
from treeflash.decoding.transitions import TransitionTable
from treeflash_cuda.drafter import Block, DrafterModel, RMSNorm
from treeflash_cuda.linear import PairLinear, RowIndex, take
from treeflash_cuda.target import Target
from treeflash_cuda.topk import divide_by_temperature, largest, top_log_probs, topk

NORM_EPS = 1e-6


class SwiGLU(nn.Module):
    """The correction of a hidden state by a previous token: D(silu(G(x)) * U(x))."""

    name = "swiglu"

    def __init__(self, config: DrafterConfig, inner_size: int) -> None:
        """Make the projections; `inner_size` is I."""
        super().__init__()
        h = config.hidden_size
        self.norm = RMSNorm(h, NORM_EPS)
        self.ug = PairLinear(h, 2 * inner_size, bias=True)
        self.d = nn.Linear(inner_size, h, bias=False)

    def forward(self, embedded: Tensor, normed: Tensor, rows: RowIndex) -> Tensor:
        """(n, hidden_size) corrections.

        Args:
            embedded: (n, hidden_size) embeddings of the previous tokens.
            normed: (D, hidden_size) u = norm(h).
            rows: (n,) the row of `normed` that each one corrects.
        """
        up, gate = self.ug(self.norm(embedded), normed, rows).chunk(2, -1)
        return self.d(up * F.silu(gate))


class Linear(nn.Module):
    """The paper's ablation: D(x), linear in the previous token and the hidden state."""

    name = "linear"

    def __init__(self, config: DrafterConfig, inner_size: int) -> None:
        """Make the projection, which has no inner size."""
        super().__init__()
        h = config.hidden_size
        self.norm = RMSNorm(h, NORM_EPS)
        self.d = PairLinear(h, h, bias=False)

    def forward(self, embedded: Tensor, normed: Tensor, rows: RowIndex) -> Tensor:
        """See `SwiGLU.forward`."""
        return self.d(self.norm(embedded), normed, rows)


HEADS = {head.name: head for head in (SwiGLU, Linear)}
"""By their names in a checkpoint's `ar_approximation`."""


class ARHead:
    """`treeflash.decoding.interfaces.ARHead` in PyTorch."""

    def __init__(self, correction: SwiGLU | Linear, model: DrafterModel, target: Target) -> None:
        """Use the head's weights with the drafter's norm and the target's embeddings."""
        self.correction = correction
        self.model = model
        self.target = target

    @torch.inference_mode()
    def transitions(
        self,
        block: Block,
        m: int,
        k: int,
        temperature: float,
        *,
        shortlist: int | None = None,
        rows: int | None = None,
    ) -> TransitionTable:
        """See `ARHead.transitions`."""
        hidden = block.hidden[1:]
        normed = self.model.norm(hidden)
        logits = self.target.output_head(normed)
        marginal = divide_by_temperature(logits, temperature).log_softmax(-1)
        vocab = None
        if shortlist is not None and shortlist < self.target.vocab_size:
            vocab = largest(marginal.amax(0), shortlist)
            marginal = marginal.index_select(1, vocab)
        m = min(m, marginal.shape[1])
        weights, previous = (x.flatten() for x in topk(marginal[:-1], m))
        kept = weights.argsort(descending=True, stable=True)[:rows].sort().values
        previous = previous[kept]
        if vocab is not None:
            previous = vocab[previous]
        root = previous.new_full((1,), block.root)
        # Places among all D * M rows: the root's, and the kept ones of the deeper depths.
        places = torch.cat([torch.zeros_like(root), m + kept])
        depth = places // m
        corrected = self._correct(hidden, normed, torch.cat([root, previous]), depth)
        if vocab is None:
            logits = self.target.output_head(corrected)
            tokens, log_probs = top_log_probs(logits, k, temperature)
        else:
            logits = self.target.shortlist_logits(corrected, vocab)
            best, log_probs = top_log_probs(logits, k, temperature)
            tokens = vocab[best].int()
            log_probs += marginal.logsumexp(-1)[depth, None]
        ids = torch.cat([places[1:], previous]).int()
        read = torch.cat([ids, tokens.flatten(), log_probs.view(torch.int32).flatten()])
        ids_, tokens_, log_probs_ = np.split(
            read.cpu().numpy(), np.cumsum([ids.numel(), tokens.numel()])
        )
        return TransitionTable.from_rows(
            *np.split(ids_, 2),
            tokens_.reshape(tokens.shape),
            log_probs_.view(np.float32).reshape(tokens.shape),
            (len(hidden), m),
        )

    @torch.inference_mode()
    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `ARHead.log_probs`."""
        hidden = block.hidden[1:]
        tokens = torch.from_numpy(previous).to(hidden.device)
        corrected = self._correct(hidden, self.model.norm(hidden), tokens, None)
        return self.target.output_head(corrected).float().log_softmax(-1).cpu().numpy()

    def _correct(self, hidden: Tensor, normed: Tensor, previous: Tensor, rows: RowIndex) -> Tensor:
        """(n, hidden_size) inputs of the target's output head.

        Args:
            hidden: (D, hidden_size) outputs of the drafter.
            normed: (D, hidden_size) the same, normalised.
            previous: (n,) tokens.
            rows: (n,) the output that each one corrects.
        """
        embedded = self.target.embed(previous)
        return self.model.norm(take(hidden, rows) + self.correction(embedded, normed, rows))
