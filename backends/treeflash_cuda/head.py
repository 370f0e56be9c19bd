"""The head that makes a block autoregressive, approximately (TreeFlash, section 3)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.config import DrafterConfig
from treeflash.transitions import TransitionTable
from treeflash_cuda.drafter import Block, DrafterModel, RMSNorm, top
from treeflash_cuda.linear import PairLinear
from treeflash_cuda.target import Target

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

    def forward(self, embedded: Tensor, normed: Tensor) -> Tensor:
        """Corrections, (..., M, hidden_size).

        Args:
            embedded: (..., M, hidden_size) embeddings of previous tokens.
            normed: (..., hidden_size) u = norm(h), one for M previous tokens.
        """
        up, gate = self.ug(self.norm(embedded), normed).chunk(2, -1)
        return self.d(up * F.silu(gate))


class Linear(nn.Module):
    """The ablation of the paper: D(x), linear in the previous token and the hidden state."""

    name = "linear"

    def __init__(self, config: DrafterConfig, inner_size: int) -> None:
        """Make the projection, which has no inner size."""
        super().__init__()
        h = config.hidden_size
        self.norm = RMSNorm(h, NORM_EPS)
        self.d = PairLinear(h, h, bias=False)

    def forward(self, embedded: Tensor, normed: Tensor) -> Tensor:
        """See `SwiGLU.forward`."""
        return self.d(self.norm(embedded), normed)


HEADS = {head.name: head for head in (SwiGLU, Linear)}
"""By the name that a checkpoint's `ar_approximation` gives."""


class ARHead:
    """`treeflash.interfaces.ARHead` in PyTorch."""

    def __init__(self, correction: SwiGLU | Linear, model: DrafterModel, target: Target) -> None:
        """Join the head's weights with the drafter's norm and the target's embeddings."""
        self.correction = correction
        self.model = model
        self.target = target

    @torch.inference_mode()
    def transitions(
        self, block: Block, m: int, k: int, temperature: float, shortlist: int | None
    ) -> TransitionTable:
        """See `ARHead.transitions`."""
        hidden = block.hidden[1:]
        normed = self.model.norm(hidden)
        depths = len(hidden)
        if shortlist is None or shortlist >= self.target.vocab_size:
            m = min(m, self.target.vocab_size)
            previous = self.target.output(normed[:-1]).topk(m).indices
            corrected = self._rows(hidden, normed, block.root, previous)
            tokens, log_probs = top(self.target.output(corrected), k, temperature)
        else:
            m = min(m, shortlist)
            scaled = self.target.output(normed).float() / temperature
            marginal = scaled - scaled.logsumexp(-1, keepdim=True)
            vocab = marginal.amax(0).topk(shortlist).indices.sort().values
            marginal = marginal[:, vocab]
            previous = vocab[marginal[:-1].topk(m).indices]
            corrected = self._rows(hidden, normed, block.root, previous)
            rows, log_probs = top(self.target.output_of(corrected, vocab), k, temperature)
            tokens = vocab[rows].int()
            kept = marginal.logsumexp(-1)
            log_probs += torch.cat([kept[:1], kept[1:].repeat_interleave(m)])[:, None]
        read = torch.cat(
            [previous.int().flatten(), tokens.flatten(), log_probs.view(torch.int32).flatten()]
        )
        host = read.cpu().numpy()
        rows = host[previous.numel() :].reshape(2, len(tokens), -1)
        return TransitionTable.from_candidates(
            host[: previous.numel()].reshape(depths - 1, m),
            spread(rows[0], depths, m),
            spread(rows[1].view(np.float32), depths, m),
        )

    @torch.inference_mode()
    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `ARHead.log_probs`."""
        hidden = block.hidden[1:]
        tokens = torch.from_numpy(previous[:, None]).to(hidden.device)
        corrected = self._correct(hidden, self.model.norm(hidden), tokens)
        logits = self.target.output(self.model.norm(corrected))
        return logits.float().log_softmax(-1).cpu().numpy()

    def _rows(self, hidden: Tensor, normed: Tensor, root: int, previous: Tensor) -> Tensor:
        """(1 + (D - 1) * M, hidden_size) for the head; depth 1 has the root's row alone."""
        first = torch.tensor([[root]], device=hidden.device)
        parts = (
            self._correct(hidden[:1], normed[:1], first),
            self._correct(hidden[1:], normed[1:], previous),
        )
        return self.model.norm(torch.cat(parts))

    def _correct(self, hidden: Tensor, normed: Tensor, previous: Tensor) -> Tensor:
        """(d * M, hidden_size) corrected outputs of d depths, from (d, M) previous tokens."""
        embedded = F.embedding(previous, self.target.embeddings)
        return (hidden[:, None] + self.correction(embedded, normed)).flatten(0, 1)


def spread(rows: np.ndarray, depths: int, m: int) -> np.ndarray:
    """(depths, m, k) from 1 + (depths - 1) * m rows: depth 1 has the root's row alone."""
    padding = np.repeat(rows[:1], m - 1, 0)
    return np.concatenate([rows[:1], padding, rows[1:]]).reshape(depths, m, -1)
