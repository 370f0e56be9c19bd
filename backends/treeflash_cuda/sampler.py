"""Choosing the target's tokens."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import NOT_FINITE
from treeflash.errors import NumericalError
from treeflash_cuda import cpu_sampler, gpu_sampler
from treeflash_cuda.graphs import Graphs

BLOCK = 256
"""Tokens reduced together in the first step of an argmax."""


def choose(
    logits: Tensor,
    sampling: SamplingConfig,
    uniforms: NDArray[np.float64] | None,
    graphs: Graphs | None = None,
) -> NDArray[np.int32]:
    """Choose a token per row, as `treeflash.decoding.sampling.choose` does.

    It reads once from a GPU, and once more if a nucleus is larger than the sampler's shortlist.

    Args:
        logits: (n, vocab).
        sampling: temperature and filters.
        uniforms: (n,) in [0, 1); None when greedy.
        graphs: replay the arithmetic; None computes it.

    Raises:
        NumericalError: a row's largest logit is not finite.
    """
    graphs = graphs or Graphs(logits.device)
    if sampling.greedy:
        read = graphs.run("argmax", None, _argmax, logits)[0].cpu().numpy()
        if not read[-1]:
            raise NumericalError(NOT_FINITE)
        return read[:-1].astype(np.int32)
    assert uniforms is not None
    if logits.device.type == "cpu":
        return cpu_sampler.sample(logits, sampling, uniforms).astype(np.int32)
    return gpu_sampler.sample(logits, sampling, uniforms, graphs).astype(np.int32)


def _argmax(logits: Tensor) -> tuple[Tensor]:
    """(n + 1,) the best token of each row, the first one in a tie; and whether all are finite."""
    n, vocab = logits.shape
    block = math.gcd(vocab, BLOCK)
    blocks = logits.view(n, -1, block)
    # A maximum is several times as fast as an argmax: search only the block with the maximum.
    best, best_block = blocks.amax(-1).max(-1)
    candidates = blocks[torch.arange(n, device=logits.device), best_block]
    tokens = best_block * block + candidates.argmax(-1)
    return (torch.cat([tokens, best.isfinite().all()[None]]),)
