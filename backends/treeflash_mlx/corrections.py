"""TreeFlash's corrections of a hidden state by a previous token (section 3 of the paper)."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from treeflash.drafter_config import DrafterConfig
from treeflash_mlx.linear import PairLinear

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
            rows: (n,) the row of `normed` that each one corrects.
        """
        up, gate = mx.split(self.ug(self.norm(embedded), normed, rows), 2, -1)
        correction: mx.array = self.d(nn.silu(gate) * up)
        return correction


class Linear(nn.Module):
    """The paper's ablation: D(x), linear in the previous token and the hidden state."""

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


CORRECTIONS = {correction.name: correction for correction in (SwiGLU, Linear)}
"""By their names in a checkpoint's `ar_approximation`."""
