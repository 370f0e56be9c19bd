"""The head that makes a block autoregressive, approximately (TreeFlash, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from treeflash.config import DrafterConfig
from treeflash.decoding.transitions import TransitionTable
from treeflash_mlx.drafter import Block, drafted
from treeflash_mlx.drafter_model import DrafterModel
from treeflash_mlx.linear import PairLinear
from treeflash_mlx.target import Target
from treeflash_mlx.topk import log_softmax, logsumexp, top_indices, top_log_probs

NORM_EPS = 1e-6


class SwiGLU(nn.Module):
    """The correction of a hidden state by a previous token: D(silu(G(x)) * U(x))."""

    name = "swiglu"

    def __init__(self, config: DrafterConfig, inner_size: int) -> None:
        """Make the projections; `inner_size` is I."""
        super().__init__()
        h = config.hidden_size
        self.norm = nn.RMSNorm(h, NORM_EPS)
        self.ug = PairLinear(h, 2 * inner_size, bias=True)
        self.d = nn.Linear(inner_size, h, bias=False)

    def __call__(self, embedded: mx.array, normed: mx.array, rows: mx.array) -> mx.array:
        """(n, hidden_size) corrections.

        Args:
            embedded: (n, hidden_size) embeddings of the previous tokens.
            normed: (D, hidden_size) u = norm(h).
            rows: (n,) the row of `normed` that each corrects.
        """
        up, gate = mx.split(self.ug(self.norm(embedded), normed, rows), 2, -1)
        correction: mx.array = self.d(nn.silu(gate) * up)
        return correction


class Linear(nn.Module):
    """The ablation of the paper: D(x), linear in the previous token and the hidden state."""

    name = "linear"

    def __init__(self, config: DrafterConfig, inner_size: int) -> None:
        """Make the projection, which has no inner size."""
        super().__init__()
        h = config.hidden_size
        self.norm = nn.RMSNorm(h, NORM_EPS)
        self.d = PairLinear(h, h, bias=False)

    def __call__(self, embedded: mx.array, normed: mx.array, rows: mx.array) -> mx.array:
        """See `SwiGLU.__call__`."""
        correction: mx.array = self.d(self.norm(embedded), normed, rows)
        return correction


HEADS = {head.name: head for head in (SwiGLU, Linear)}
"""By the name that a checkpoint's `ar_approximation` gives."""


class ARHead:
    """`treeflash.decoding.interfaces.ARHead` in MLX."""

    def __init__(self, correction: SwiGLU | Linear, model: DrafterModel, target: Target) -> None:
        """Join the head's weights with the drafter's norm and the target's embeddings."""
        self.correction = correction
        self.model = model
        self.target = target

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
        """See `ARHead.transitions`; all texts are computed together."""
        vocab_size, texts = self.target.vocab_size, len(blocks)
        size = min(shortlist or vocab_size, vocab_size)
        m, k = min(m, size), min(k, size)
        hidden = drafted(blocks)
        depths = len(hidden) // texts
        normed = self.model.norm(hidden)
        marginal = log_softmax(self.target.output_head(normed).astype(mx.float32) / temperature)
        marginal = marginal.reshape(texts, depths, -1)
        vocab = None
        if size < vocab_size:
            vocab = mx.sort(top_indices(marginal.max(1), size))
            marginal = mx.take_along_axis(marginal, vocab[:, None], 2)
        kept, previous = _scored_rows(marginal[:, :-1], m, rows)
        if vocab is not None:
            previous = mx.take_along_axis(vocab, previous, 1)
        # Of the D * M rows: the root's, and those kept of the M at each further depth.
        depth = mx.concatenate([mx.zeros((texts, 1), mx.int32), kept // m + 1], 1)
        roots = mx.array([[block.root] for block in blocks], mx.int32)
        after = mx.concatenate([roots, previous], 1).reshape(-1)
        index = (depth + depths * mx.arange(texts)[:, None]).reshape(-1)
        corrected = self._correct(hidden, normed, after, index)
        if vocab is None:
            logits = self.target.output_head(corrected)
            children, log_probs = top_log_probs(logits, k, temperature)
        else:
            own = corrected.reshape(texts, -1, corrected.shape[-1])
            logits = self.target.shortlist_logits(own, vocab).reshape(-1, size)
            children, log_probs = top_log_probs(logits, k, temperature)
            children = mx.take_along_axis(vocab, children.reshape(texts, -1), 1)
            mass = logsumexp(marginal.reshape(-1, size))
            log_probs = log_probs + mass[index]
        # Token ids are exact in float32, and one array needs one read from the device.
        parts = [part.reshape(texts, -1) for part in (m + kept, previous, children, log_probs)]
        read = np.array(mx.concatenate([part.astype(mx.float32) for part in parts], 1))
        sizes = np.cumsum([part.shape[1] for part in parts[:-1]])
        tables = []
        for numbers in read:
            places, previous_, tokens, log_probs_ = np.split(numbers, sizes)
            tables.append(
                TransitionTable.from_rows(
                    places.astype(np.int32),
                    previous_.astype(np.int32),
                    tokens.astype(np.int32).reshape(-1, k),
                    log_probs_.reshape(-1, k),
                    (depths, m),
                )
            )
        return tables

    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `ARHead.log_probs`."""
        hidden = block.hidden[1:]
        normed, rows = self.model.norm(hidden), mx.arange(hidden.shape[0])
        corrected = self._correct(hidden, normed, mx.array(previous), rows)
        return np.array(log_softmax(self.target.output_head(corrected)))

    def _correct(
        self, hidden: mx.array, normed: mx.array, previous: mx.array, rows: mx.array
    ) -> mx.array:
        """(n, hidden_size) for the target's head.

        Args:
            hidden: (D, hidden_size) outputs.
            normed: (D, hidden_size) the same, normalised.
            previous: (n,) tokens.
            rows: (n,) the output that each corrects.
        """
        correction = self.correction(self.target.embed(previous), normed, rows)
        corrected: mx.array = self.model.norm(hidden[rows] + correction)
        return corrected


def _scored_rows(marginal: mx.array, m: int, rows: int | None) -> tuple[mx.array, mx.array]:
    """The previous tokens whose children are scored.

    Args:
        marginal: (texts, D - 1, vocab) log probabilities.
        m: the tokens of each depth to choose from.
        rows: how many of each text to keep, those of the highest log probability; None keeps all.

    Returns:
        (texts, r) indices into the (D - 1) * m tokens of a text, ascending, and (texts, r) the
        tokens.
    """
    texts, depths, vocab = marginal.shape
    if not depths:  # a block of two; MLX before 0.32.4 crashes when it sorts nothing
        return mx.zeros((texts, 0), mx.int32), mx.zeros((texts, 0), mx.int32)
    flat = marginal.reshape(-1, vocab)
    best = top_indices(flat, m)
    weights = mx.take_along_axis(flat, best, 1).reshape(texts, -1)
    kept = mx.sort(mx.argsort(-weights)[:, :rows]).astype(mx.int32)
    return kept, mx.take_along_axis(best.reshape(texts, -1), kept, 1)
