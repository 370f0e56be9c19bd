"""Pairs without models, whose drafters propose made-up tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from treeflash.decoding.interfaces import Pass, Prefill
from treeflash.decoding.sampling import SampledTokens
from treeflash.drafters.loading import drafter_config
from treeflash.errors import CheckpointError

VOCAB = 259  # of the byte tokenizer
DEPTHS = 5
COMMON = 42


def token_at(position):
    """The target's token at a position, after any prefix."""
    return 3 + position * 7 % 200


def rows_at(start, depths=DEPTHS, share=0.7):
    """A block's log probabilities: `share` more for the true token, beyond `depths` for COMMON."""
    rows = np.full((DEPTHS, VOCAB), 0.3 / VOCAB)
    for depth in range(1, DEPTHS + 1):
        rows[depth - 1, token_at(start + depth) if depth <= depths else COMMON] += share
    return np.log(rows).astype(np.float32)


@dataclass
class Head:
    """A head that knows the true tokens of some depths, and records the previous tokens."""

    depths: int = DEPTHS

    def log_probs(self, block, previous):
        self.previous = previous
        return rows_at(block, self.depths)


@dataclass
class MadeUpState:
    """A state that has a length only."""

    length: int = 0
    nbytes: int = 0

    def close(self):
        pass


@dataclass
class MadeUp:
    """A pair with a folder's configuration; other fields are of the drafter's training."""

    folder: Path
    layers: tuple[int, ...] = (1, 2)
    mask: int = 2
    causal: bool | None = None
    scale: float | None = None
    prompts: tuple[list[int], ...] | None = None
    late: int = 0  # depths that each row is late by
    depths: int = DEPTHS
    head: Head | None = None
    vocab_size: int = VOCAB
    inexact: str | None = "rounding may differ"
    images = "it is made up"
    max_positions: int = 1000

    def __post_init__(self):
        self.drafter_config = drafter_config(self.folder)
        if max(self.drafter_config.target_layer_ids) > 2:
            raise CheckpointError("the target has no such layer")

        self.verifier = self.drafter = self

    def open(self, capacity, *, drafts):
        return MadeUpState()

    def state_nbytes(self, capacity, *, drafts):
        return 0

    def run(self, work):
        return Pass([self.extend(x) if isinstance(x, Prefill) else self.verify(x) for x in work])

    def extend(self, work):
        state = work.state
        self.prompt = self.prompt if state.length else list(work.token_ids)
        state.length += len(work.token_ids)
        return SampledTokens(np.array([token_at(state.length)], np.int32))

    def verify(self, work):
        return SampledTokens(np.array([token_at(work.state.length + 1)], np.int32))

    def commit(self, verified, paths):
        for state, path in paths:
            state.length += len(path)

    def draft(self, roots, depths=None):
        ((state, root),) = roots
        assert root == token_at(state.length)
        return [state.length]

    def log_probs(self, block):
        fits = (
            self.drafter_config.target_layer_ids == self.layers
            and self.drafter_config.mask_token_id == self.mask
            and self.causal in (None, self.drafter_config.causal[0])
            and self.scale in (None, self.drafter_config.input_scale)
            and (self.prompts is None or self.prompt in self.prompts)
        )
        return rows_at(block - self.late, self.depths, 0.7 if fits else 0.2)
