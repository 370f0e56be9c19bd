"""A target whose layers are split between processes: tensor parallelism under `torchrun`.

Rank 0 decodes: it alone has a drafter, a scheduler and a user. Before each call on the target it
broadcasts what it does, and the other ranks do the same with their parts of the layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from treeflash.decoding.choices import Choice, Chosen
from treeflash.decoding.interfaces import Extension, Verification
from treeflash.decoding.tree import DraftTree
from treeflash.errors import NumericalError
from treeflash_cuda.arena import Arena
from treeflash_cuda.ranks import broadcast
from treeflash_cuda.state import State
from treeflash_cuda.target import Target
from treeflash_cuda.verifier import Verifier

RELEASE_S = 0.5
"""Time for the threads of a process group to release the last message, seconds."""


class LeaderState(State):
    """The state of a text on rank 0; the other ranks have states with the same number."""

    def __init__(
        self,
        target: Arena,
        drafter: Arena | None,
        capacity: int,
        block: int = 0,
        transposed: frozenset[int] | None = None,
    ) -> None:
        """See `State`."""
        super().__init__(target, drafter, capacity, block, transposed)
        self.number = id(self)
        broadcast(("open", self.number, capacity))

    def fork(self, length: int, capacity: int) -> State:
        """See `TextState.fork`."""
        new = super().fork(length, capacity)
        assert isinstance(new, LeaderState)
        broadcast(("copy", self.number, new.number, length))
        return new

    def truncate(self, length: int) -> None:
        """See `TextState.truncate`."""
        super().truncate(length)
        broadcast(("truncate", self.number, length))

    def close(self) -> None:
        """See `TextState.close`."""
        super().close()
        broadcast(("close", self.number))


class LeaderVerifier(Verifier):
    """The target on rank 0."""

    def run(self, work: Sequence[Extension | Verification]) -> list[Chosen | None]:
        """See `TreeVerifier.run`."""
        items = []
        for item in work:
            state: Any = item.state
            tokens = item.tree if isinstance(item, Verification) else item.token_ids
            items.append((state.number, tokens, item.choice is not None))
        broadcast(("run", items))
        return super().run(work)

    def commit(self, paths: Sequence[tuple[Any, NDArray[np.int32]]]) -> None:
        """See `TreeVerifier.commit`."""
        broadcast(("commit", [(state.number, path) for state, path in paths]))
        super().commit(paths)

    def logits(self, trees: Sequence[tuple[Any, DraftTree]]) -> list[NDArray[np.float32]]:
        """See `TreeVerifier.logits`."""
        broadcast(("logits", [(state.number, tree) for state, tree in trees]))
        return super().logits(trees)


def follow(target: Target) -> None:
    """Do what rank 0 does with the target, until it ends."""
    verifier = Verifier(target, None)
    states: dict[int, State] = {}
    while True:
        name, *rest = broadcast()
        if name == "end":
            _leave()
            return
        if name == "open":
            number, capacity = rest
            states[number] = State(target.arena, None, capacity)
        elif name == "copy":
            old, new, length = rest
            states[new].key_values.copy_from(states[old].key_values, length)
        elif name == "truncate":
            number, length = rest
            states[number].truncate(length)
        elif name == "close":
            if (state := states.pop(rest[0], None)) is not None:
                state.close()
        elif name == "commit":
            verifier.commit([(states[number], path) for number, path in rest[0]])
        elif name == "logits":
            verifier.logits([(states[number], tree) for number, tree in rest[0]])
        else:
            with suppress(NumericalError):  # rank 0 reports it
                verifier.run([_work(states[number], *item) for number, *item in rest[0]])


def end() -> None:
    """On rank 0, end the other ranks."""
    if dist.is_initialized():
        broadcast(("end",))
        _leave()


def _leave() -> None:
    dist.destroy_process_group()
    # After a call returned, gloo's threads still release its tensors, for which they need the
    # interpreter. They abort the process if they find it shutting down.
    time.sleep(RELEASE_S)


def _work(state: State, tokens: Any, wanted: bool) -> Extension | Verification:
    if isinstance(tokens, DraftTree):
        return Verification(state, tokens, Choice())
    return Extension(state, tokens, Choice() if wanted else None)
