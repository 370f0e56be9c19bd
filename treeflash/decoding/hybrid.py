"""Hybrid targets: the rules of a recurrent layer on a draft tree, for both device backends.

A recurrent layer reads the state after a node's parent. No state of a node is stored: with A the
ancestor mask (`DraftTree.ancestor_mask`), g_i the log decay of node i, S the committed state and
l = A g, the chunked form of the gated delta rule (arXiv 2412.06464, section 3.3) holds on a tree if
the ancestor mask replaces the causal mask:

    D_ij = exp(l_i - l_j) where A_ij, else 0
    u_i  = beta_i (v_i - exp(l_i) S^T k_i - sum_{j proper ancestor} D_ij (k_j . k_i) u_j)
    o_i  = exp(l_i) S^T q_i + sum_j D_ij (q_i . k_j) u_j

Gated linear attention and Mamba-2 (arXiv 2405.21060) have u_i = v_i. A path p_1 .. p_a is
committed by S <- exp(sum g) S + sum_j exp(sum of g after j) k_j u_j^T, with decays that are summed
along the path.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_BY_CHANNEL = "their recurrent layers decay each channel of the state separately"
_BY_TOKEN = "their layers depend on the last tokens (n-gram embeddings or an index of blocks)"
_COMPRESSED = "their attention layers compress the KV cache as the text grows"
UNSUPPORTED: Mapping[str, str] = {
    "baichuan_m1": "their attention layers apply a short convolution to the keys",
    "deepseek_v4": _COMPRESSED,
    "deepseek_v41": _COMPRESSED,
    "deepseek_v41_text": _COMPRESSED,
    "falcon_mamba": _BY_CHANNEL,
    "inkling2_loop_text": _BY_TOKEN,
    "inkling2_text": _BY_TOKEN,
    "jamba": _BY_CHANNEL,
    "longcat_flash_ngram": _BY_TOKEN,
    "mamba": _BY_CHANNEL,
    "minimax": "their lightning attention has its own kind of cache",
    "qwen4_exp": _BY_TOKEN,
    "qwen4_exp_text": _BY_TOKEN,
    "recurrent_gemma": _BY_CHANNEL,
    "rwkv": _BY_CHANNEL,
    "rwkv7": _BY_CHANNEL,
    "xlstm": "their cells divide the state by a running maximum",
    "zamba": _BY_CHANNEL,
    "zaya": "their convolutions mix channels",
}
"""By model type, why its layers cannot run a draft tree."""


def refusal(model_type: str, reason: str | None = None) -> str:
    """Name the layers of a target that cannot run a draft tree, or give `UNSUPPORTED`'s reason."""
    reason = reason or UNSUPPORTED.get(model_type, "their recurrent layers are of an unknown kind")
    return f"{model_type} models cannot run a draft tree: {reason}"


def convolution_windows(parents: NDArray[np.int32], kernel: int) -> NDArray[np.int32]:
    """(n, W) int32 inputs of a causal convolution of width W = `kernel` at every node of a tree.

    They are row numbers: the rows are the W - 1 last inputs of the committed sequence and then the
    inputs of the n nodes. Each node has its W - 1 nearest ancestors, the nearest last, and itself.
    """
    windows = np.empty((len(parents), kernel), np.int32)
    current = np.arange(len(parents), dtype=np.int32)
    for column in reversed(range(kernel)):
        windows[:, column] = kernel - 1 + current  # a negative number counts back from the root
        current = np.where(current >= 0, parents[np.maximum(current, 0)], current - 1)
    return windows


def convolution_tail(path: NDArray[np.int32], kernel: int) -> NDArray[np.int32]:
    """(W - 1,) int32 last inputs once the (a,) nodes of a path are committed, the root first.

    They are row numbers as in `convolution_windows`.
    """
    rows = np.concatenate([np.arange(kernel - 1), kernel - 1 + path])
    return rows[len(path) :].astype(np.int32)
