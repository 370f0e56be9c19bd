"""The head that makes a block autoregressive, approximately (TreeFlash, section 3)."""

from __future__ import annotations

import numpy as np

from treeflash.reference.drafter import Block, DrafterWeights
from treeflash.reference.numerics import Array, rms_norm, silu, top
from treeflash.transitions import TransitionTable

NORM_EPS = 1e-6


class SwiGLUHead:
    """`treeflash.interfaces.ARHead` in NumPy: h' = h + D(silu(G(x)) * U(x))."""

    def __init__(self, weights: DrafterWeights) -> None:
        """Take the `ar_approximation` tensors of a drafter."""
        self.weights = weights

    def transitions(self, block: Block, m: int, k: int, temperature: float) -> TransitionTable:
        """See `ARHead.transitions`."""
        hidden = block.hidden[1:]
        previous, _ = top(self.weights.logits(hidden[:-1]), m)
        first = np.full((1, previous.shape[1]), block.root, np.int32)
        corrected = self._correct(hidden, np.concatenate([first, previous]))
        tokens, log_probs = top(self.weights.logits(corrected) / np.float32(temperature), k)
        return TransitionTable.from_candidates(previous, tokens, log_probs)

    def _correct(self, hidden: Array, previous: np.ndarray) -> Array:
        """(D, M, hidden_size) corrected outputs; hidden is (D, hidden_size), previous (D, M)."""
        tensors = self.weights.tensors
        embedded = self.weights.target.embeddings[previous]
        embedded = rms_norm(embedded, tensors["ar_approximation.norm.weight"], NORM_EPS)
        normed = np.broadcast_to(self.weights.normed("norm", hidden)[:, None], embedded.shape)
        x = np.concatenate([embedded, normed], -1)
        up_gate = x @ tensors["ar_approximation.ug.weight"].T + tensors["ar_approximation.ug.bias"]
        up, gate = np.split(up_gate, 2, -1)
        corrected: Array = (
            hidden[:, None] + (up * silu(gate)) @ tensors["ar_approximation.d.weight"].T
        )
        return corrected
