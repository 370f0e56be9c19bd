"""Rows of several experts, sorted by expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def routed(
    hidden: Tensor,  # (rows, size)
    chosen: Tensor,  # (rows, per_token) experts of each row
    weights: Tensor,  # (rows, per_token) of the experts
    experts: int,
    network: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the (rows, size) weighted sums of the outputs of each row's experts.

    The `network` is given the (n, size) inputs of all pairs of a row and an expert, sorted by
    expert, and the (experts,) int32 ends of the experts' pairs.
    """
    per_token = chosen.shape[1]
    ascending, order = chosen.flatten().sort()
    numbers = torch.arange(experts, device=chosen.device)
    ends = torch.searchsorted(ascending, numbers, right=True, out_int32=True)
    x = network(hidden.index_select(0, order // per_token), ends)
    x = x * weights.flatten()[order, None]
    pairs = torch.empty_like(x).index_copy_(0, order, x)
    return pairs.view(-1, per_token, x.shape[1]).sum(1)
