"""The target's output head in training: over the vocabulary or a shortlist of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**27
"""Logits in memory at once: half a gigabyte in float32."""


@dataclass(frozen=True, eq=False)
class Shortlist:
    """A part of the vocabulary that represents all of it.

    Attributes:
        tokens: (v,) the tokens to score, then a random sample of the others.
        wanted: how many tokens to score there are.
        log_weights: (v,) 0 for the former; for the sample, the log of the number of tokens that
            each represents.
        index: (vocab,) the index of a token in `tokens`; -1 if it is not there.
    """

    tokens: Tensor
    wanted: int
    log_weights: Tensor
    index: Tensor


class LMHead:
    """The target's output head: logits of the vocabulary, or of a shortlist."""

    def __init__(self, head: nn.Module) -> None:
        """Take the weights of a linear layer."""
        self.weight: Tensor = head.weight.detach()
        bias = getattr(head, "bias", None)
        self.bias: Tensor | None = None if bias is None else bias.detach()

    def logits(self, hidden: Tensor, shortlist: Shortlist | None = None) -> Tensor:
        """(n, v) float32 from (n, hidden_size); the log weights of a shortlist are added."""
        weight, bias = self.weight, self.bias
        if shortlist is not None:
            weight = weight[shortlist.tokens]
            token_bias = 0 if bias is None else bias[shortlist.tokens]
            bias = (shortlist.log_weights + token_bias).to(weight.dtype)
        return F.linear(hidden.to(weight.dtype), weight, bias).float()


def make_shortlist(
    wanted: Tensor, vocab_size: int, negatives: int, generator: torch.Generator
) -> Shortlist | None:
    """All wanted tokens and a uniform sample of the others; None if that is the vocabulary.

    The normaliser over a shortlist is unbiased, as each sampled token is weighted by the number of
    tokens that it represents (sampled softmax, Bengio and Senecal 2008).

    Args:
        wanted: token ids, in any shape.
        vocab_size: of the target.
        negatives: size of the sample.
        generator: on the CPU, so that a run is the same on every device.
    """
    index = torch.full((vocab_size,), -1, dtype=torch.long)
    index[wanted.flatten().cpu()] = 0
    kept = torch.nonzero(index == 0)[:, 0]
    others = torch.nonzero(index < 0)[:, 0]
    if negatives >= len(others):
        return None
    # With replacement: simple and unbiased, as a token drawn twice counts twice.
    drawn = others[torch.randint(len(others), (negatives,), generator=generator)]
    tokens = torch.cat([kept, drawn])
    index[tokens] = torch.arange(len(tokens))
    weights = torch.zeros(len(tokens))
    weights[len(kept) :] = math.log(len(others) / negatives)
    device = wanted.device
    return Shortlist(tokens.to(device), len(kept), weights.to(device), index.to(device))


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]], rows: Sequence[Tensor], width: int
) -> tuple[Tensor, ...]:
    """Apply a function to a few rows at a time, so that only the logits of those are in memory.

    The gradient computes them again, chunk by chunk. If all fit at once, they are kept.

    Args:
        function: of the rows of several tensors, to tensors of as many rows.
        rows: (n, ...) each.
        width: logits that the function makes of a row.
    """
    size = max(1, CHUNK_LOGITS // width)
    if len(rows[0]) <= size:
        return function(*rows)
    chunks = zip(*(tensor.split(size) for tensor in rows), strict=True)
    parts = [checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
