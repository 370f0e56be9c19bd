"""TreeFlash's corrections of a hidden state by a previous token (section 3 of the paper)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from treeflash.drafter_config import DrafterConfig
from treeflash_cuda.drafter_model import RMSNorm
from treeflash_cuda.linear import PairLinear, RowIndex

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


CORRECTIONS = {correction.name: correction for correction in (SwiGLU, Linear)}
"""By their names in a checkpoint's `ar_approximation`."""
