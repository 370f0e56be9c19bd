"""A thread that runs a scheduler for event loops and other threads.

A scheduler must not be called by two threads at once, and one of its iterations takes milliseconds
to seconds, during which an event loop could serve nobody. So one thread owns the scheduler. Others
send it commands, which it runs between two iterations, and it hands out the events of each
iteration:

    event loop                         thread
    call(submit two requests)    ->    runs the commands that wait, then an iteration
    gets two events              <-    hands them to `receive`, which puts them into mailboxes
    call(cancel a request)       ->    runs the command, then an iteration
    gets one event               <-    ...

When no sequence is left, the thread of a server waits for commands until it is stopped. The thread
of a loaded model ends, so that nobody has to close the model; another one starts when it is needed.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Generic, TypeVar

from treeflash.decoding.loop import Event
from treeflash.decoding.scheduler import Scheduler

T = TypeVar("T")
BETWEEN_COPIES_S = 0.01
"""Seconds for which an idle thread waits for commands while it has states to copy to the disk."""


class Mailbox(Generic[T]):
    """A queue that any thread fills and one event loop empties: the loop that made it.

    Attributes:
        closed: whether nobody waits for items any more.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[T] = asyncio.Queue()
        self.closed = False

    async def get(self) -> T:
        """Return the oldest item, and wait until there is one."""
        return await self._items.get()

    def put(self, items: Iterable[T]) -> None:
        """Add items; closes the mailbox if its event loop is closed."""

        def put() -> None:
            for item in items:
                self._items.put_nowait(item)

        try:
            self._loop.call_soon_threadsafe(put)
        except RuntimeError:  # the event loop is closed
            self.closed = True


class SchedulerThread(threading.Thread):
    """A thread that owns a scheduler; see the module.

    Args:
        make: makes the scheduler, in the thread.
        receive: takes the events of each iteration, in the thread.
        fail: takes the error of a command, of an iteration, or of `receive`, in the thread. The
            error ended all sequences.
        stays: whether the thread waits for commands while it has no sequence, until `stop`.
        turn: entered for each iteration, where several threads compute.

    Attributes:
        made: the scheduler once it is made, or the error of `make`.
        stopping: set to end the thread before its next iteration.
    """

    def __init__(
        self,
        make: Callable[[], Scheduler],
        receive: Callable[[list[Event]], None],
        fail: Callable[[Exception], None],
        *,
        stays: bool,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        # A server may end at any time; a text of the Python API is completed or cancelled.
        super().__init__(name="treeflash-scheduler", daemon=stays)
        self.made: Future[Scheduler] = Future()
        self.stopping = False
        self._make, self._receive, self._fail, self._stays = make, receive, fail, stays
        self._turn = nullcontext() if turn is None else turn
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ending = threading.Lock()  # held to add a command, and to end without one
        self._ended = False

    def call(self, command: Callable[[], None]) -> bool:
        """Run a command before the next iteration; False if the thread has ended and does not."""
        with self._ending:
            if not self._ended:
                self._commands.put(command)
            return not self._ended

    def stop(self) -> None:
        """Drop all sequences, and wait for the end of the thread."""
        self.stopping = True
        self.call(lambda: None)  # it may be waiting for a command
        self.join()

    def run(self) -> None:
        """Make the scheduler, then run commands and iterations until the thread is to end."""
        try:
            self._run()
        finally:  # an error ended it: the next command needs another thread
            with self._ending:
                self._ended = True

    def _run(self) -> None:
        try:
            scheduler = self._make()
        except BaseException as error:
            self.made.set_exception(error)
            return
        self.made.set_result(scheduler)
        while not self._is_over(scheduler):
            try:
                self._advance(scheduler)
            except Exception as error:
                try:
                    scheduler.close()
                finally:
                    self._fail(error)
        scheduler.close()
        if scheduler.prefix_cache is not None:
            scheduler.prefix_cache.close()

    def _is_over(self, scheduler: Scheduler) -> bool:
        with self._ending:
            idle = not self._stays and not scheduler.busy and self._commands.empty()
            self._ended = self.stopping or idle
            return self._ended

    def _advance(self, scheduler: Scheduler) -> None:
        """Run the commands that wait, then an iteration; without sequences, store states."""
        self._run_commands(scheduler)
        if not scheduler.busy:
            scheduler.store_states()
            return
        with self._turn:
            events = scheduler.step()
        self._receive(events)

    def _run_commands(self, scheduler: Scheduler) -> None:
        """Run the commands of other threads; a thread that stays waits for one if it is idle."""
        with suppress(queue.Empty):
            while True:
                idle = not scheduler.busy and not self.stopping
                timeout = BETWEEN_COPIES_S if scheduler.stores_states else None
                self._commands.get(block=self._stays and idle, timeout=timeout)()
