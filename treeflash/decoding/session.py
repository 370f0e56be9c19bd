"""A sequence driven call by call: for probes, measurements and tests, not for decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Self

import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding.images import PromptImages
from treeflash.decoding.interfaces import Backend, Block, Pass, Prefill, Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.tree import DraftTree

GREEDY = SamplingConfig()


class SequenceSession:
    """A sequence whose tokens the caller decides; empty at first.

    `drafts` says whether `draft` will be called; `capacity` counts positions, the nodes of the
    largest tree included.

    Attributes:
        verified: the pass over the tree that was verified last, of which a path can be committed.
    """

    def __init__(self, backend: Backend, *, drafts: bool = False, capacity: int = 1024) -> None:
        self.backend = backend
        self.state = backend.open(capacity, drafts=drafts)
        self.verified = Pass()

    @property
    def length(self) -> int:
        """Committed positions."""
        return self.state.length

    def extend(
        self,
        token_ids: Sequence[int],
        sampling: SamplingConfig = GREEDY,
        images: PromptImages | None = None,
    ) -> int:
        """Commit tokens; returns the target's token after them. See `Prefill` for the images."""
        after = np.array([self.length + len(token_ids)], np.int32)
        params = SamplingParams.from_positions(sampling, after)
        work = Prefill(self.state, token_ids, params, images)
        (sampled,) = self.backend.verifier.run([work]).sampled
        assert sampled is not None
        return int(sampled.tokens[-1])

    def verify(self, tree: DraftTree, sampling: SamplingConfig = GREEDY) -> NDArray[np.int32]:
        """Return the (n,) int32 the target's tokens at the nodes of a tree."""
        params = SamplingParams.from_positions(sampling, tree.positions(self.length + 1))
        self.verified = self.backend.verifier.run([Verify(self.state, tree, params)])
        (sampled,) = self.verified.sampled
        assert sampled is not None
        return sampled.tokens

    def logits(self, tree: DraftTree) -> NDArray[np.float32]:
        """Return the (n, vocab) target's logits at the nodes of a tree."""
        self.verified = self.backend.verifier.logits([(self.state, tree)])
        (logits,) = self.verified.logits
        return logits

    def commit(self, path: NDArray[np.int32]) -> None:
        """Keep a path of the tree that was verified last."""
        self.backend.verifier.commit(self.verified, [(self.state, path)])
        self.verified = Pass()

    def draft(self, root: int, depths: int | None = None) -> Block:
        """Draft a block after `root`, the token at the next position; see `Drafter.draft`."""
        assert self.backend.drafter is not None
        (block,) = self.backend.drafter.draft([(self.state, root)], depths)
        return block

    def fork(self, length: int, capacity: int) -> Self:
        """Return a sequence with the first positions of this one; see `SequenceState.fork`."""
        new = copy(self)
        new.state = self.state.fork(length, capacity)
        return new

    def close(self) -> None:
        self.state.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


STRIDE = 4
"""Tokens from one anchor to the next: neighbouring blocks are nearly the same."""


def draft_anchors(
    backend: Backend, prompt_ids: Sequence[int], text_ids: Sequence[int], *, logits: bool = False
) -> Iterator[tuple[Sequence[int], Block, NDArray[np.float32] | None]]:
    """Draft after every fourth token of a known text, except the last token.

    Yields the text from the root of a block on, the block and, if `logits` are asked for, the
    (n, vocab) of the target after the first n of these tokens, n at most the depths of the block.
    """
    assert backend.drafter_config is not None
    depths = backend.drafter_config.depths
    stride = min(STRIDE, depths)
    capacity = len(prompt_ids) + len(text_ids) + depths
    with SequenceSession(backend, drafts=True, capacity=capacity) as session:
        session.extend(prompt_ids)
        for start in range(0, len(text_ids) - 1, stride):
            tokens = text_ids[start:]
            known = np.array(tokens[:-1][:depths], np.int32)
            rows = session.logits(DraftTree.chain(known)) if logits else None
            yield tokens, session.draft(tokens[0]), rows
            if logits:
                session.commit(np.arange(min(stride, len(known)), dtype=np.int32))
            elif start + stride < len(text_ids) - 1:
                session.extend(tokens[:stride])
