"""What block drafters and their heads share, written once for PyTorch and MLX."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

from treeflash.decoding.sampling import Noise
from treeflash.drafters.heads.operations import Array, Operations


@dataclass(frozen=True, eq=False)
class Block:
    """What a drafter hands to its head for one sequence."""

    root: int  # token id of the first slot
    hidden: Array  # (D, hidden_size) outputs of the last layer at the slots of the wanted depths


class OutputStage(ABC):
    """From tokens to embeddings and from hidden states to logits, for a drafter and its head.

    Args:
        model: the backend's model of the drafter. Its `own` vocabulary has what is not the
            target's, with `token_ids`: (Vd,) the target's ids of the tokens that it can propose;
            None for all.
        target: the backend's.

    Attributes:
        norm: the final norm, to apply before `logits`.
    """

    ops: Operations

    def __init__(self, model: Any, target: Any) -> None:
        self.config, self.norm, self.own, self.target = model.config, model.norm, model.own, target

    @abstractmethod
    def embed(self, tokens: Array) -> Array:
        """Compute (..., hidden_size) rows of the input table, from (...) tokens of the target."""

    @abstractmethod
    def noise_by_depth(self, noise: Noise | None, depths: int) -> Iterable[Array | None]:
        """Compute the (sequences, Vd) noise of each depth, or None without noise."""

    @abstractmethod
    def head_logits(self, normed: Array, tokens: Array | None) -> Array:
        """Return what `logits` does, without the factor and the softcap."""

    def logits(self, normed: Array, tokens: Array | None = None) -> Array:
        """Return (n, Vd) logits of normalised outputs, or (n, v) of some of the drafter's tokens.

        These are (v,) tokens for all rows, or (b, v) for each of b equal parts of the rows. Logits
        are float32 if the drafter has a factor or a softcap on them.
        """
        logits = self.head_logits(normed, tokens)
        if self.config.output_multiplier != 1:
            logits = self.ops.float32(logits) * self.config.output_multiplier
        if (cap := self.config.softcap) is not None:
            logits = cap * self.ops.tanh(self.ops.float32(logits) / cap)
        return logits

    def to_target(self, tokens: Array) -> Array:
        """Return the target's ids of the drafter's tokens."""
        ids = self.own.token_ids
        return tokens if ids is None else self.ops.cast(ids[tokens], tokens)

    @property
    def vocab_size(self) -> int:
        """Vd, the number of tokens that the drafter can propose."""
        ids = self.own.token_ids
        return self.target.vocab_size if ids is None else len(ids)

    def over_target_vocabulary(self, log_probs: Array) -> Array:
        """Return the (n, vocab) from (n, Vd); tokens that the drafter cannot propose have -inf."""
        ids = self.own.token_ids
        if ids is None:
            return log_probs
        wide = self.ops.full((len(log_probs), self.target.vocab_size), -inf, log_probs)
        wide[:, ids] = log_probs
        return wide
