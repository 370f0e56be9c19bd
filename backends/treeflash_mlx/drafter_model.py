"""The model of a one-shot drafter (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from treeflash.drafters.block_model import BlockModel
from treeflash.drafters.config import DrafterConfig
from treeflash_mlx.drafter_operations import OPERATIONS
from treeflash_mlx.target import Target


class OwnVocabulary(nn.Module):
    """The embeddings, output head and token map of a drafter that does not use the target's.

    A part that is the target's is None.
    """

    embed_tokens: nn.Embedding | None  # (vocab, hidden_size)
    lm_head: nn.Linear | None  # (Vd, hidden_size)

    def __init__(self, tensors: Mapping[str, mx.array], target: Target) -> None:
        super().__init__()
        self.embed_tokens = self.lm_head = None
        embeddings, head = tensors.get("embed_tokens.weight"), tensors.get("lm_head.weight")
        if embeddings is not None and differs(embeddings, target.embedding):
            self.embed_tokens = nn.Embedding(*embeddings.shape)
            self.embed_tokens.weight = embeddings.astype(target.dtype)
        if head is not None and differs(head, target.output_module):
            self.lm_head = nn.Linear(*head.shape[::-1], bias=False)
            self.lm_head.weight = head.astype(target.dtype)
        offsets = tensors.get("d2t")
        ids = None if offsets is None else offsets + mx.arange(len(offsets), dtype=offsets.dtype)
        self._token_ids = None if ids is None else ids.astype(mx.int32)
        mx.eval(self._token_ids)  # only the thread that makes a lazy array can evaluate it

    @property
    def token_ids(self) -> mx.array | None:
        """(Vd,) int32 target ids of the tokens that the drafter can propose; None for all."""
        return self._token_ids


CHUNK = 4096
"""Rows of a quantised table that are compared at once."""


def differs(weight: mx.array, module: Any) -> bool:
    """Return whether a weight differs from a module's weight by more than rounding.

    That is rounding to the dtype of the module's weight, or to its bits if it is quantised.
    """
    if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return not mx.array_equal(weight.astype(module.weight.dtype), module.weight).item()
    if len(weight) != len(module.weight):
        return True
    # Normal weights in groups of 64 have an error of 1.5 / 2**bits, other weights of more than 1.
    most = 3 / 2**module.bits
    return not all(
        _quantisation_error(weight, module, first) <= most for first in range(0, len(weight), CHUNK)
    )


def _quantisation_error(weight: mx.array, module: Any, first: int) -> float:
    """Measure the error of a module's quantised rows from `first` on, relative to a weight's."""
    rows = slice(first, first + CHUNK)
    expected = weight[rows].astype(mx.float32)
    biases = None if module.biases is None else module.biases[rows]
    options = module.group_size, module.bits, module.mode
    found = mx.dequantize(module.weight[rows], module.scales[rows], biases, *options)
    if found.shape != expected.shape:
        return math.inf
    error = mx.linalg.norm(found.astype(mx.float32) - expected) / mx.linalg.norm(expected)
    return float(np.array(error))


class VocabularyOwner(nn.Module):
    """A drafter's model that has the parts of the vocabulary that are not the target's."""

    _own: OwnVocabulary  # loaded already, so not among the parameters

    @property
    def own(self) -> OwnVocabulary:
        return self._own


class DrafterModel(BlockModel, VocabularyOwner):
    """The model as a module of MLX, with its own vocabulary."""

    ops = OPERATIONS

    def __init__(self, config: DrafterConfig, own: OwnVocabulary) -> None:
        super().__init__(config)
        self._own = own
