"""Pairs without models: what their drafter proposes is made up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from treeflash.decoding.choices import Chosen
from treeflash.decoding.interfaces import Extension
from treeflash.drafters.formats import drafter_config
from treeflash.errors import CheckpointError

VOCAB = 259  # of the byte tokenizer
DEPTHS = 5
COMMON = 42


def token_at(position):
    """What the target says there, whatever came before."""
    return 3 + position * 7 % 200


def rows_at(start, depths=DEPTHS, share=0.7):
    """A block's log probabilities: so much for the true token at some depths, else for COMMON."""
    rows = np.full((DEPTHS, VOCAB), 0.3 / VOCAB)
    for depth in range(1, DEPTHS + 1):
        rows[depth - 1, token_at(start + depth) if depth <= depths else COMMON] += share
    return np.log(rows).astype(np.float32)


@dataclass
class Head:
    """A head that drafts at some depths, and notes what it was given."""

    depths: int = DEPTHS

    def log_probs(self, block, previous):
        self.previous = previous
        return rows_at(block, self.depths)


@dataclass
class MadeUpText:
    """Its length is all that the pair knows of it."""

    length: int = 0
    nbytes: int = 0

    def close(self):
        pass


@dataclass
class MadeUp:
    """A pair as its folder says; the other fields say what the drafter was made for."""

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
    max_positions: int = 1000

    def __post_init__(self):
        self.drafter_config = drafter_config(self.folder)
        if max(self.drafter_config.target_layer_ids) > 2:
            raise CheckpointError("the target has no such layer")

        self.verifier = self.drafter = self

    def open(self, capacity, *, drafts):
        return MadeUpText()

    def state_nbytes(self, capacity, *, drafts):
        return 0

    def run(self, work):
        return [self.extend(x) if isinstance(x, Extension) else self.verify(x) for x in work]

    def extend(self, work):
        text = work.state
        self.prompt = self.prompt if text.length else list(work.token_ids)
        text.length += len(work.token_ids)
        return Chosen(np.array([token_at(text.length)], np.int32))

    def verify(self, work):
        return Chosen(np.array([token_at(work.state.length + 1)], np.int32))

    def commit(self, paths):
        for text, path in paths:
            text.length += len(path)

    def draft(self, roots, depths=None):
        ((text, root),) = roots
        assert root == token_at(text.length)
        return [text.length]

    def log_probs(self, block):
        fits = (
            self.drafter_config.target_layer_ids == self.layers
            and self.drafter_config.mask_token_id == self.mask
            and self.causal in (None, self.drafter_config.causal[0])
            and self.scale in (None, self.drafter_config.input_scale)
            and (self.prompts is None or self.prompt in self.prompts)
        )
        return rows_at(block - self.late, self.depths, 0.7 if fits else 0.2)
