"""Random schedules with failures, and faults of the scheduler that they must find."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from schedule_machine import FaultyVerifier, ScheduleMachine

from treeflash.decoding import Request
from treeflash.decoding.backend_base import Snapshots
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.iteration import Iteration, RunningSequence
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.scheduler import Scheduler
from treeflash.testing.pairs import EXAMPLES

short = settings(
    max_examples=8,
    stateful_step_count=30,
    derandomize=True,
    phases=[Phase.generate],  # a shorter schedule takes long to find
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def test_random_schedules():
    run_state_machine_as_test(ScheduleMachine, settings=short)


# Minutes. They are others every night; a planted fault shows in most of them or in few.
@pytest.mark.nightly
def test_new_random_schedules():
    many = max(EXAMPLES, 300)
    long = settings(short, max_examples=many, stateful_step_count=60, derandomize=False)
    run_state_machine_as_test(ScheduleMachine, settings=long)


def cancel_waiting_alone(self: Scheduler, request: Request, *, keep: bool = False) -> None:
    self._waiting = [x for x in self._waiting if x.request is not request]


def cancel_running_alone(self: Scheduler, request: Request, *, keep: bool = False) -> None:
    for sequence in [x for x in self.sequences if x.request is request]:
        self._end(sequence, keep=keep)


def commit_twice(
    self: FaultyVerifier, verified: Any, paths: Any, plain: Any = FaultyVerifier.commit
) -> None:
    plain(self, verified, paths)
    if len(paths) > 1:
        plain(self, verified, paths)


def keep_failed(
    self: Scheduler, sequence: RunningSequence, *, keep: bool = False, plain: Any = Scheduler._end
) -> None:
    plain(self, sequence, keep=True)


def copy_all_snapshots(
    self: Snapshots[Any], length: int, plain: Any = Snapshots.copy
) -> Snapshots[Any]:
    return plain(self, sys.maxsize)


def shrink_for_sequences_alone(
    self: PrefixCache, nbytes: int, plain: Any = PrefixCache.shrink
) -> None:
    # The cache's own limit is kept twice: in `put`, and when a sequence has ended.
    if nbytes != self.max_bytes:
        plain(self, nbytes)


def drop_without_closing(self: PrefixCache, entry: Any, *, save: bool) -> None:
    self.entries.remove(entry)


def share_with_all(self: Scheduler, request: Any) -> Any:
    return self.backend, request.config.drafts


def leave_the_state_open(self: RunningSequence) -> None:
    self.loop.close()


def give_every_prompt_the_whole_room(self: Iteration) -> dict[RunningSequence, int]:
    room = self.prefill_chunks[0 if self._pending(Verify) else 1]
    return {x: min(x.chunk_size, room) for x in self._pending(Prefill)}


def end_all(self: Iteration, sequences: Any, phase: Any, call: Any) -> Any:
    try:
        yield from zip(sequences, call(sequences) if sequences else [], strict=True)
    except Exception as error:
        for sequence in sequences:
            sequence.fail(error)


def admit_the_last_first(self: Scheduler, plain: Any = Scheduler.step) -> Any:
    self._waiting.reverse()
    events = plain(self)
    self._waiting.reverse()
    return events


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a lost cancellation": (Scheduler, "cancel", cancel_waiting_alone),
    "a lost cancellation of a waiting request": (Scheduler, "cancel", cancel_running_alone),
    "a leaked state": (RunningSequence, "close", leave_the_state_open),
    "a leaked state of the prefix cache": (PrefixCache, "_drop", drop_without_closing),
    "a snapshot kept too long": (Snapshots, "copy", copy_all_snapshots),
    "a double commit": (FaultyVerifier, "commit", commit_twice),
    "a failed state in the prefix cache": (Scheduler, "_end", keep_failed),
    "a prefix cache without a limit": (PrefixCache, "shrink", shrink_for_sequences_alone),
    "a prefix cache that does not make room": (Scheduler, "_make_room", lambda *_, **__: True),
    "states shared by all salts": (Scheduler, "_cache_key", share_with_all),
    "prompts without a limit": (Iteration, "_chunks", give_every_prompt_the_whole_room),
    "an error that ends the whole batch": (Iteration, "_batch", end_all),
    "requests out of order": (Scheduler, "step", admit_the_last_first),
}


RARE = {"a snapshot kept too long": "test_backend_base.py"}
"""A fault that takes so many schedules, more than half of the time of all, that it waits for the
night, and the tests that notice it every time. Others take a few schedules each."""


@pytest.mark.parametrize(
    "fault", [pytest.param(x, marks=pytest.mark.nightly if x in RARE else ()) for x in FAULTS]
)
def test_a_planted_fault_is_found(monkeypatch, fault):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises((AssertionError, KeyError, IndexError, ValueError)):
        # The walk ends with the first schedule that finds the fault.
        run_state_machine_as_test(ScheduleMachine, settings=settings(short, max_examples=1000))
