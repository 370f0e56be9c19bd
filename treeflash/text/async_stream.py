"""Streams of text for `asyncio`: the sequences of all streams of a model are decoded together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TypeAlias

from treeflash.config import AUTO
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import Event, Step
from treeflash.decoding.scheduler_thread import Mailbox, SchedulerThread
from treeflash.text.generation import Generation
from treeflash.text.stream import Assembler, Chunk, scheduler_config

Steps: TypeAlias = Mailbox[Step | Exception | None]
"""Takes the steps of one sequence, the error that ended it, and None for whoever still waits once
the stream has ended; closed to cancel the sequence."""


class AsyncDecoder:
    """Decodes sequences for event loops, in a thread that runs while there are any."""

    def __init__(self, backend: Backend, budgets: AdaptiveBudgets) -> None:
        self._backend, self._budgets = backend, budgets
        self._starting = threading.Lock()
        self._thread: SchedulerThread | None = None
        self._mailboxes: dict[Request, Steps] = {}  # the running thread alone uses them

    def submit(self, request: Request) -> Steps:
        """Decode a sequence beside the others; call it in an event loop.

        The mailbox gets what `Scheduler.submit` raises, too.
        """
        mailbox: Steps = Mailbox()
        command = partial(self._submit, request, mailbox)
        with self._starting:
            if self._thread is None or not self._thread.call(command):
                self._thread = SchedulerThread(
                    self._make_scheduler, self._receive, self._fail, stays=False
                )
                self._thread.call(command)
                self._thread.start()
        return mailbox

    # The methods below run in the thread.

    def _make_scheduler(self) -> Scheduler:
        self._scheduler = Scheduler(self._backend, scheduler_config(AUTO), budgets=self._budgets)
        return self._scheduler

    def _submit(self, request: Request, mailbox: Steps) -> None:
        try:
            self._scheduler.submit_group([request], raises_limit=True)
        except Exception as error:
            mailbox.put([error])
        else:
            self._mailboxes[request] = mailbox

    def _receive(self, events: list[Event]) -> None:
        """Hand out the steps, then cancel each sequence whose own mailbox is closed."""
        for request, event in events:
            self._mailboxes[request].put([event])
            if isinstance(event, Exception) or event.finish_reason is not None:
                del self._mailboxes[request]
        for request, mailbox in list(self._mailboxes.items()):
            if mailbox.closed:
                self._scheduler.cancel(request)
                del self._mailboxes[request]

    def _fail(self, error: Exception) -> None:
        for mailbox in self._mailboxes.values():
            mailbox.put([error])
        self._mailboxes.clear()


class AsyncStream(AsyncIterator[Chunk]):
    """An asynchronous iterator of chunks: a `Stream` for an event loop.

    The prompt is encoded and decoding starts with the first chunk, which raises what is wrong with
    the prompt. `aclose`, the end of an `async with` block, and a task that is cancelled while it
    waits for a chunk end the text early; other texts of the model continue.
    """

    def __init__(self, prepare: Callable[[], Assembler], decoder: AsyncDecoder) -> None:
        self._prepare, self._decoder = prepare, decoder
        self._assembler: Assembler | None = None
        self._mailbox: Steps | None = None
        self._ended = False

    async def __anext__(self) -> Chunk:
        if self._ended:
            raise StopAsyncIteration
        try:
            if self._assembler is None:
                # Long prompts and grammars take a while.
                self._assembler = await asyncio.to_thread(self._prepare)
                if self._ended:  # meanwhile, by another task
                    raise StopAsyncIteration
            if self._mailbox is None:
                self._mailbox = self._decoder.submit(self._assembler.request())
            step = await self._mailbox.get()
            if step is None:  # another task has ended the stream
                raise StopAsyncIteration
            if isinstance(step, Exception):
                raise step
            chunk = self._assembler.add(step)
        except BaseException:
            self._end()
            raise
        if chunk.finish_reason is not None:
            self._end()  # a stop string may have ended the text before its sequence
        return chunk

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end()

    async def aclose(self) -> None:
        """End the text here; no chunk follows, and the current iteration is its last."""
        self._end()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        self._ended = True
        if self._mailbox is not None:
            self._mailbox.closed = True
            self._mailbox.put([None])

    async def run(self) -> Generation:
        """Wait for the whole text."""
        async for _ in self:
            pass
        return self.generation()

    def generation(self) -> Generation:
        """Join all chunks so far, at least one; see `Stream.generation`."""
        if self._assembler is None:
            raise RuntimeError("the stream has no chunk yet; iterate over it first")
        return self._assembler.generation()
