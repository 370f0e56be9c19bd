"""A text driven call by call: for probes, measurements and tests, not for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding.choices import Choice
from treeflash.decoding.interfaces import Backend, Block, Extension, Verification
from treeflash.decoding.tree import DraftTree

GREEDY = SamplingConfig()


class TextSession:
    """A text whose tokens the caller decides.

    Attributes:
        backend: a loaded pair.
        state: of the text.
    """

    def __init__(self, backend: Backend, *, drafts: bool = False, capacity: int = 1024) -> None:
        """Open an empty text.

        Args:
            backend: a loaded pair.
            drafts: whether `draft` will be called.
            capacity: positions, those of the largest tree included.
        """
        self.backend = backend
        self.state = backend.open(capacity, drafts=drafts)

    @property
    def length(self) -> int:
        """Committed positions."""
        return self.state.length

    def extend(self, token_ids: Sequence[int], sampling: SamplingConfig = GREEDY) -> int:
        """Commit tokens; returns the token that the target chooses after them."""
        after = np.array([self.length + len(token_ids)], np.int32)
        work = Extension(self.state, token_ids, Choice.at(sampling, after))
        (chosen,) = self.backend.verifier.run([work])
        assert chosen is not None
        return int(chosen.tokens[-1])

    def verify(self, tree: DraftTree, sampling: SamplingConfig = GREEDY) -> NDArray[np.int32]:
        """(n,) int32 the target's tokens at the nodes of a tree."""
        choice = Choice.at(sampling, tree.positions(self.length + 1))
        work = Verification(self.state, tree, choice)
        (chosen,) = self.backend.verifier.run([work])
        assert chosen is not None
        return chosen.tokens

    def logits(self, tree: DraftTree) -> NDArray[np.float32]:
        """(n, vocab) the target's logits at the nodes of a tree."""
        (logits,) = self.backend.verifier.logits([(self.state, tree)])
        return logits

    def commit(self, path: NDArray[np.int32]) -> None:
        """Keep a path of the tree that was verified last."""
        self.backend.verifier.commit([(self.state, path)])

    def draft(self, root: int, depths: int | None = None) -> Block:
        """The drafter's block after `root`, the token at the next position; see `Drafter.draft`."""
        assert self.backend.drafter is not None
        (block,) = self.backend.drafter.draft([(self.state, root)], depths)
        return block

    def close(self) -> None:
        """Give the memory back."""
        self.state.close()

    def __enter__(self) -> TextSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
