"""The head that makes a block autoregressive, approximately (TreeFlash, section 3)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx import nn

from treeflash.transitions import TransitionTable
from treeflash_mlx.drafter import Block, DrafterModel
from treeflash_mlx.target import Target
from treeflash_mlx.topk import top, top_log_probs

NORM_EPS = 1e-6


class SwiGLU(nn.Module):
    """h' = h + D(silu(G(x)) * U(x)), with the parameters named as in a checkpoint."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        """Make its parts."""
        super().__init__()
        self.ug = nn.Linear(2 * hidden_size, 2 * inner_size)
        self.d = nn.Linear(inner_size, hidden_size, bias=False)
        self.norm = nn.RMSNorm(hidden_size, NORM_EPS)

    def __call__(self, hidden: mx.array, normed: mx.array, embedded: mx.array) -> mx.array:
        """(n, hidden_size) corrected outputs.

        Args:
            hidden: (n, hidden_size) outputs of the last layer.
            normed: likewise, after the final norm.
            embedded: (n, hidden_size) embeddings of the previous tokens.
        """
        up, gate = mx.split(self.ug(mx.concatenate([self.norm(embedded), normed], -1)), 2, -1)
        corrected: mx.array = hidden + self.d(nn.silu(gate) * up)
        return corrected


class ARHead:
    """`treeflash.interfaces.ARHead` in MLX."""

    def __init__(self, swiglu: SwiGLU, model: DrafterModel, target: Target) -> None:
        """Hold the head with what it works on."""
        self.swiglu = swiglu
        self.model = model
        self.target = target

    def transitions(self, block: Block, m: int, k: int, temperature: float) -> TransitionTable:
        """See `ARHead.transitions`."""
        m, k = min(m, self.target.vocab_size), min(k, self.target.vocab_size)
        hidden = block.hidden[1:]
        normed = self.model.norm(hidden)
        depths = hidden.shape[0]
        # Row 0 is depth 1 after the root; then m rows for each further depth.
        previous = top(self.target.head(normed[:-1]), m).reshape(-1)
        tokens = mx.concatenate([mx.array([block.root], mx.int32), previous])
        rows = mx.array(np.repeat(np.arange(depths), [1] + [m] * (depths - 1)))
        corrected = self.swiglu(hidden[rows], normed[rows], self.target.embed(tokens))
        logits = self.target.head(self.model.norm(corrected))
        children, log_probs = top_log_probs(logits, k, temperature)
        # Token ids are exact in float32, and one array is one read.
        read = np.array(
            mx.concatenate(
                [
                    previous.astype(mx.float32),
                    children.reshape(-1).astype(mx.float32),
                    log_probs.reshape(-1),
                ]
            )
        )
        candidates, children_, log_probs_ = np.split(
            read, np.cumsum([previous.size, children.size])
        )
        return TransitionTable.from_candidates(
            candidates.astype(np.int32).reshape(depths - 1, m),
            _table(children_.astype(np.int32).reshape(-1, k), m),
            _table(log_probs_.reshape(-1, k), m),
        )


def _table(rows: np.ndarray, m: int) -> np.ndarray:
    """(D, m, k) from (1 + (D - 1) * m, k): depth 1 repeats its one row."""
    return np.concatenate([np.repeat(rows[:1], m, axis=0), rows[1:]]).reshape(-1, m, rows.shape[1])
