"""The processes of `torchrun`, and tensors that are split between them."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def ranks() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def broadcast(message: Any = None) -> Any:
    """A message from rank 0 to all."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be split between ranks, on each of them."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather().detach()


def whole_output_head(head: Any) -> nn.Module:
    """A copy of the output head that one rank can use alone, for its drafter."""
    weight, bias = whole(head.weight), head.bias
    with torch.device("meta"):
        copy = nn.Linear(weight.shape[1], len(weight), bias is not None)
    copy.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        copy.bias = nn.Parameter(whole(bias), requires_grad=False)
    return copy
