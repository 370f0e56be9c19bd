"""The head that makes a block autoregressive, approximately (TreeFlash, section 3)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from treeflash.config import DrafterConfig
from treeflash.decoding.transitions import TransitionTable
from treeflash_mlx.drafter import Block, DrafterModel
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
        block: Block,
        m: int,
        k: int,
        temperature: float,
        *,
        shortlist: int | None = None,
        rows: int | None = None,
    ) -> TransitionTable:
        """See `ARHead.transitions`."""
        vocab_size = self.target.vocab_size
        size = min(shortlist or vocab_size, vocab_size)
        m, k = min(m, size), min(k, size)
        hidden = block.hidden[1:]
        normed = self.model.norm(hidden)
        marginal = log_softmax(self.target.output_head(normed).astype(mx.float32) / temperature)
        vocab = None
        if size < vocab_size:
            vocab = mx.sort(top_indices(marginal.max(0, keepdims=True), size)[0])
            marginal = marginal[:, vocab]
        kept, previous = _scored_rows(marginal[:-1], m, rows)
        if vocab is not None:
            previous = vocab[previous]
        # Of the D * M rows: the root's, and those kept of the M at each further depth.
        depth = mx.concatenate([mx.zeros(1, mx.int32), kept // m + 1])
        after = mx.concatenate([mx.array([block.root], mx.int32), previous])
        corrected = self._correct(hidden, normed, after, depth)
        if vocab is None:
            children, log_probs = top_log_probs(self.target.output_head(corrected), k, temperature)
        else:
            logits = self.target.shortlist_logits(corrected, vocab)
            children, log_probs = top_log_probs(logits, k, temperature)
            children = vocab[children]
            log_probs = log_probs + logsumexp(marginal)[depth]
        # Token ids are exact in float32, and one array needs one read from the device.
        parts = (m + kept, previous, children.reshape(-1), log_probs.reshape(-1))
        read = np.array(mx.concatenate([part.astype(mx.float32) for part in parts]))
        sizes = np.cumsum([part.size for part in parts[:-1]])
        places, previous_, tokens, log_probs_ = np.split(read, sizes)
        return TransitionTable.from_rows(
            places.astype(np.int32),
            previous_.astype(np.int32),
            tokens.astype(np.int32).reshape(children.shape),
            log_probs_.reshape(children.shape),
            (hidden.shape[0], m),
        )

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
        marginal: (D - 1, vocab) log probabilities.
        m: the tokens of each depth to choose from.
        rows: how many to keep, those of the highest log probability; None keeps all.

    Returns:
        (r,) indices into the (D - 1) * m tokens, ascending, and (r,) the tokens.
    """
    if not len(marginal):  # a block of two; MLX before 0.32.4 crashes when it sorts nothing
        return mx.zeros(0, mx.int32), mx.zeros(0, mx.int32)
    best = top_indices(marginal, m)
    weights = mx.take_along_axis(marginal, best, 1).reshape(-1)
    kept = mx.sort(mx.argsort(-weights)[:rows]).astype(mx.int32)
    return kept, best.reshape(-1)[kept]
