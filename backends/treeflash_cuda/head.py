"""The AR head, which conditions a block on previous tokens (TreeFlash, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.config import DrafterConfig
from treeflash.decoding.transitions import TransitionTable
from treeflash_cuda.drafter import Block, drafted
from treeflash_cuda.drafter_model import DrafterModel, RMSNorm
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
        blocks: Sequence[Block],
        m: int,
        k: int,
        temperature: float,
        *,
        shortlist: int | None = None,
        rows: int | None = None,
    ) -> list[TransitionTable]:
        """See `ARHead.transitions`; the products of all texts are computed together."""
        hidden = drafted(blocks)
        depths = len(hidden) // len(blocks)
        normed = self.model.norm(hidden)
        logits = self.target.output_head(normed)
        marginals = divide_by_temperature(logits, temperature).log_softmax(-1)
        texts = [
            _Candidates.of(block.root, part, m, shortlist, rows)
            for block, part in zip(blocks, marginals.split(depths), strict=True)
        ]
        index = [text.depth + i * depths for i, text in enumerate(texts)]
        previous = [text.previous for text in texts]
        corrected = self._correct(hidden, normed, _cat(previous), _cat(index))
        parts = corrected.split([len(text.previous) for text in texts])
        read = _cat([self._children(*x, k, temperature) for x in zip(texts, parts, strict=True)])
        numbers = read.cpu().numpy()
        tables = []
        for text in texts:
            n, width = len(text.previous), min(k, text.vocab_size)
            own, numbers = np.split(numbers, [2 * n * (1 + width)])
            ids, tokens, log_probs = np.split(own, [2 * n, (2 + width) * n])
            places, previous_ids = np.split(ids, 2)
            tables.append(
                TransitionTable.from_rows(
                    places[1:],
                    previous_ids[1:],
                    tokens.reshape(n, width),
                    log_probs.view(np.float32).reshape(n, width),
                    (depths, text.m),
                )
            )
        return tables

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

    def _children(self, text: _Candidates, corrected: Tensor, k: int, temperature: float) -> Tensor:
        """The numbers of a text's table, as int32 for one read from the device.

        Places and previous tokens of its n rows, (n, k) children, (n, k) log probabilities.
        """
        if text.vocab is None:
            logits = self.target.output_head(corrected)
            tokens, log_probs = top_log_probs(logits, k, temperature)
        else:
            logits = self.target.shortlist_logits(corrected, text.vocab)
            best, log_probs = top_log_probs(logits, k, temperature)
            tokens = text.vocab[best].int()
            log_probs += text.mass[text.depth, None]
        ids = torch.cat([text.places, text.previous]).int()
        return torch.cat([ids, tokens.flatten(), log_probs.view(torch.int32).flatten()])


@dataclass(frozen=True, eq=False)
class _Candidates:
    """The rows of one text's table: the root's, and those of previous tokens that are scored.

    Attributes:
        places: (n,) among all D * m rows, ascending.
        previous: (n,) tokens, the root first.
        depth: (n,) of the rows, from 0.
        m: rows per depth, whether scored or not.
        vocab: (v,) tokens of the shortlist, ascending; None for the whole vocabulary.
        mass: (D,) log of the probability that the marginals give to the shortlist.
        vocab_size: tokens that children are chosen from.
    """

    places: Tensor
    previous: Tensor
    depth: Tensor
    m: int
    vocab: Tensor | None
    mass: Tensor
    vocab_size: int

    @classmethod
    def of(
        cls, root: int, marginal: Tensor, m: int, shortlist: int | None, rows: int | None
    ) -> _Candidates:
        """Choose them by the (D, vocab) marginal log probabilities of a block."""
        vocab = None
        if shortlist is not None and shortlist < marginal.shape[1]:
            vocab = largest(marginal.amax(0), shortlist)
            marginal = marginal.index_select(1, vocab)
        m = min(m, marginal.shape[1])
        weights, previous = (x.flatten() for x in topk(marginal[:-1], m))
        kept = weights.argsort(descending=True, stable=True)[:rows].sort().values
        previous = previous[kept]
        if vocab is not None:
            previous = vocab[previous]
        first = previous.new_full((1,), root)
        places = torch.cat([torch.zeros_like(first), m + kept])
        return cls(
            places,
            torch.cat([first, previous]),
            places // m,
            m,
            vocab,
            marginal.logsumexp(-1),
            marginal.shape[1],
        )


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
