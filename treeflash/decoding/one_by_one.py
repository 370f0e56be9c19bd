"""Base classes of small backends: they run a list of texts entry by entry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.choices import Chosen, choose
from treeflash.decoding.gumbel import Noise
from treeflash.decoding.interfaces import Block, Extension, Verification
from treeflash.decoding.text_state import TextState
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree


class WithoutRecurrence(ABC):
    """The part of a `TextState` that concerns recurrent layers, for targets that have none."""

    needs_snapshots = False

    @property
    @abstractmethod
    def length(self) -> int:
        """See `TextState.length`."""

    def snapshot(self) -> None:  # noqa: B027 (nothing to keep)
        """See `TextState.snapshot`."""

    def restorable(self, length: int) -> int:
        """See `TextState.restorable`."""
        return min(length, self.length)

    def states(self) -> list[NDArray[np.float32]]:
        """See `TextState.states`."""
        return []


class OneByOneVerifier(ABC):
    """`TreeVerifier` from a forward pass over one tree and the commit of one path."""

    @abstractmethod
    def forward(self, state: Any, tree: DraftTree) -> NDArray[np.float32]:
        """(n, vocab) logits at the nodes of a tree under the committed positions.

        New tokens of a prompt come as a chain. Nothing is committed.
        """

    @abstractmethod
    def commit_one(self, state: Any, path: NDArray[np.int32]) -> None:
        """Keep a path of the tree that `forward` saw last."""

    def run(self, work: Sequence[Extension | Verification]) -> list[Chosen | None]:
        """See `TreeVerifier.run`."""
        chosen = [self._run(item) for item in work]
        for item in work:  # only when nothing has failed
            if isinstance(item, Extension):
                self.commit_one(item.state, np.arange(len(item.token_ids), dtype=np.int32))
        return chosen

    def commit(self, paths: Sequence[tuple[TextState, NDArray[np.int32]]]) -> None:
        """See `TreeVerifier.commit`."""
        for state, path in paths:
            self.commit_one(state, path)

    def logits(self, trees: Sequence[tuple[TextState, DraftTree]]) -> list[NDArray[np.float32]]:
        """See `TreeVerifier.logits`."""
        return [self.forward(state, tree) for state, tree in trees]

    def _run(self, item: Extension | Verification) -> Chosen | None:
        if isinstance(item, Verification):
            return choose(self.forward(item.state, item.tree), item.choice)
        logits = self.forward(item.state, DraftTree.chain(np.array(item.token_ids, np.int32)))
        return None if item.choice is None else choose(logits[-1:], item.choice)


class OneByOneDrafter(ABC):
    """`Drafter` from a draft for one text."""

    @abstractmethod
    def draft_one(self, state: Any, root: int, depths: int | None) -> Block:
        """See `Drafter.draft`."""

    @abstractmethod
    def marginals_one(
        self, block: Block, k: int, temperature: float, noise: Noise | None
    ) -> TransitionTable:
        """See `Drafter.marginals`; the noise is that of the block."""

    def draft(
        self, roots: Sequence[tuple[TextState, int]], depths: int | None = None
    ) -> list[Block]:
        """See `Drafter.draft`."""
        return [self.draft_one(state, root, depths) for state, root in roots]

    def marginals(
        self, blocks: Sequence[Block], k: int, temperature: float, noise: Noise | None = None
    ) -> list[TransitionTable]:
        """See `Drafter.marginals`."""
        each = zip(blocks, _split(noise, len(blocks)), strict=True)
        return [self.marginals_one(block, k, temperature, own) for block, own in each]


class OneByOneHead(ABC):
    """`ARHead` from the transitions of one block."""

    @abstractmethod
    def transitions_one(
        self,
        block: Block,
        m: int,
        k: int,
        temperature: float,
        *,
        noise: Noise | None,
        shortlist: int | None,
        rows: int | None,
    ) -> TransitionTable:
        """See `ARHead.transitions`; the noise is that of the block."""

    def transitions(
        self,
        blocks: Sequence[Block],
        m: int,
        k: int,
        temperature: float,
        *,
        noise: Noise | None = None,
        shortlist: int | None = None,
        rows: int | None = None,
    ) -> list[TransitionTable]:
        """See `ARHead.transitions`."""
        return [
            self.transitions_one(
                block, m, k, temperature, noise=own, shortlist=shortlist, rows=rows
            )
            for block, own in zip(blocks, _split(noise, len(blocks)), strict=True)
        ]


def _split(noise: Noise | None, blocks: int) -> Sequence[Noise | None]:
    return [None] * blocks if noise is None else noise.split(blocks)
