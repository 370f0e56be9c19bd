"""A target whose layers are split between processes: tensor parallelism under `torchrun`.

Rank 0 decodes: it alone has a drafter, a scheduler and a user. Before each forward pass of the
target it broadcasts the pass, which the other ranks run with their parts of the layers.
They keep the same committed positions, but sample nothing. They need to know what changes these
positions no earlier than the next pass, whose message tells it: an iteration has one broadcast.

A forward pass has collective calls, and a call of one rank without the others ends in a deadlock.
So all ranks have equal slabs, each of which has its own passes, the same kernels, which a rank that
refuses one takes from all, and the same CUDA graphs: they capture the same calls in the same order,
keep equally many graphs, and drop a graph that one of them cannot capture. The kernels of NCCL are
parts of these graphs.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from treeflash.decoding.backend_base import PassRows
from treeflash.errors import first_line
from treeflash_cuda.cache import Arena
from treeflash_cuda.gpu.graphs import Graphs
from treeflash_cuda.recurrent_states import CommittedStates, RecurrentStates
from treeflash_cuda.state import State
from treeflash_cuda.target import Rows, RowsResult, Target
from treeflash_cuda.verifier import Path, Verifier

MAX_IDLE = timedelta(days=365)
RELEASE_S = 0.5
"""Time for the threads of a process group to release the last message, seconds."""


def process_count() -> int:
    """Return the number of processes that `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class Messages:
    """The group of processes that messages take; the default one until all ranks `connect`.

    A rank waits for the next message for as long as a server is idle. In the default group it would
    give up after some hours, and with NCCL keep its GPU busy meanwhile.
    """

    group: Any = None

    def connect(self) -> None:
        """Make a group on the CPU whose messages may take any time; all ranks call it."""
        self.group = dist.new_group(backend="gloo", timeout=MAX_IDLE)


messages = Messages()
"""What brings this process messages, or takes them from it."""


def broadcast(message: Any = None) -> Any:
    """Broadcast a message from rank 0 to all ranks; the others call it without one, and get it."""
    box = [message]
    dist.broadcast_object_list(box, src=0, group=messages.group)
    return box[0]


class Followers:
    """The other ranks, as rank 0 sees them.

    They are `lost` if rank 0 failed or was interrupted in the middle of a forward pass: they then
    wait for it in a collective call, where no message reaches them.
    """

    def __init__(self) -> None:
        self.lost = False
        self._calls: list[tuple[Any, ...]] = []  # calls that they have to make, in order

    def tell(self, *call: Any) -> None:
        """Note a call for the next broadcast; raises a RuntimeError if the followers are lost."""
        if self.lost:
            raise RuntimeError(
                "rank 0 failed in the middle of a forward pass, in which the other ranks still "
                "wait; restart torchrun"
            )
        self._calls.append(call)

    def send(self) -> None:
        """Broadcast the calls."""
        calls, self._calls = self._calls, []
        broadcast(calls)


followers = Followers()
"""The followers of this process, if it is rank 0."""


def reserve_everywhere(arena: Arena) -> None:
    """Let all ranks' arenas of the target allocate equally many bytes at once, on rank 0.

    Rank 0 has the least free memory, because it alone has a drafter.
    """
    followers.tell("reserve", arena.reserved_nbytes)


def succeeded_everywhere(succeeded: bool) -> bool:
    """Return whether a step succeeded on every rank; all ranks call it."""
    found = [False] * dist.get_world_size()
    dist.all_gather_object(found, succeeded)
    return all(found)


def reasons_everywhere(reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the reasons of all ranks, by name, the first rank's where several have one.

    All ranks call it.
    """
    found: list[Mapping[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, reasons)
    joined: dict[str, str] = {}
    for rank, refused in enumerate(found):
        for name, reason in refused.items():
            joined.setdefault(name, f"on rank {rank}, {reason}")
    return joined


_numbers = itertools.count()


class LeaderState(State):
    """The state of a sequence on rank 0; the other ranks have states with the same number."""

    def __init__(
        self,
        target: Arena,
        drafter: Arena | None,
        capacity: int,
        block: int = 0,
        recurrent: RecurrentStates | None = None,
        takes_room: bool = True,
    ) -> None:
        super().__init__(target, drafter, capacity, block, recurrent, takes_room)
        self.number = next(_numbers)
        followers.tell("open", self.number, capacity, takes_room)

    def copy(self, length: int, capacity: int, recurrent: CommittedStates | None) -> LeaderState:
        new = super().copy(length, capacity, recurrent)
        assert isinstance(new, LeaderState)
        followers.tell("copy", self.number, new.number, length, new.kv_cache.shared_token)
        return new

    def rollback(self, length: int, recurrent: CommittedStates | None) -> None:
        super().rollback(length, recurrent)
        if not followers.lost:
            followers.tell("rollback", self.number, length)

    def close(self) -> None:
        super().close()
        if not followers.lost:
            followers.tell("close", self.number)


class LeaderVerifier(Verifier):
    """The target on rank 0.

    The other ranks repeat its forward passes as they begin, and its commits when they have
    succeeded. So whatever fails on rank 0 alone, such as sampling, leaves all ranks equal.
    """

    def forward(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> RowsResult:
        numbered = [(_number(state), tokens) for state, tokens in rows]
        followers.tell("forward", numbered, list(needs_logits))
        try:
            followers.send()
            return super().forward(rows, needs_logits)
        except BaseException:  # an interrupt by the user ends the other ranks too
            followers.lost = True
            raise

    def commit_paths(self, paths: Sequence[Path]) -> None:
        super().commit_paths(paths)
        followers.tell("commit", [(_number(path.state), path.nodes) for path in paths])


def _number(state: State) -> int:
    assert isinstance(state, LeaderState)
    return state.number


def follow(target: Target) -> None:
    """Make the calls that rank 0 broadcasts, until it ends.

    A failure ends the process at once: `torchrun` then ends the other ranks, which would wait for
    this one for ever.
    """
    try:
        _follow(target)
    except Exception as error:
        reason = first_line(error)
        print(f"error: rank {dist.get_rank()} failed: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


@torch.inference_mode()  # rank 0 does so too: its tensors are changed in place later
def _follow(target: Target) -> None:
    verifier = Verifier(target, None)
    states: dict[int, State] = {}
    latest: dict[int, PassRows[State]] = {}  # the rows of each sequence in its latest pass
    for call in itertools.chain.from_iterable(iter(broadcast, None)):
        match call:
            case ("end",):
                target.graphs.clear()
                _leave()
                return
            case "reserve", nbytes:
                target.arena.reserved_nbytes = nbytes
            case "open", number, capacity, takes_room:
                states[number] = State(target.arena, None, capacity, 0, None, takes_room)
            case "copy", old, new, length, token:
                states[new].kv_cache.copy_from(states[old].kv_cache, length, token)
            case "rollback", number, length:
                states[number].rollback(length, None)
            case "close", number:
                latest.pop(number, None)
                if (state := states.pop(number, None)) is not None:
                    state.close()
            case "forward", rows, needs_logits:
                found = verifier.forward([(states[number], x) for number, x in rows], needs_logits)
                latest |= {number: x for (number, _), x in zip(rows, found.rows, strict=True)}
            case "commit", paths:
                verifier.commit_paths([Path(latest[number], nodes) for number, nodes in paths])


def end(graphs: Graphs) -> None:
    """End the other ranks, on rank 0."""
    graphs.clear()
    if dist.is_initialized() and not followers.lost:
        followers.tell("end")
        followers.send()
        _leave()


def _leave() -> None:
    dist.destroy_process_group()
    # After a call returned, gloo's threads still release its tensors, for which they need the
    # interpreter. They abort the process if they find it shutting down.
    time.sleep(RELEASE_S)
