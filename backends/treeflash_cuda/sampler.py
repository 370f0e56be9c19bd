"""Choosing the target's tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import SamplingConfig
from treeflash_cuda import cpu_sampler, gpu_sampler
from treeflash_cuda.graphs import Graphs


def choose(
    logits: Tensor,
    sampling: SamplingConfig,
    keys: NDArray[np.uint32] | None,
    graphs: Graphs | None = None,
) -> NDArray[np.int32]:
    """Choose a token per row, as `treeflash.decoding.sampling.choose` does.

    It reads once from a GPU, and once more if a nucleus is larger than the sampler's shortlist.

    Args:
        logits: (n, vocab).
        sampling: temperature and filters.
        keys: (n, 2) of the noise; None when greedy.
        graphs: replay the arithmetic; None computes it.

    Raises:
        NumericalError: a row's largest logit is not finite.
    """
    if logits.device.type == "cpu":
        return cpu_sampler.choose(logits, sampling, keys).astype(np.int32)
    return gpu_sampler.choose(logits, sampling, keys, graphs).astype(np.int32)
