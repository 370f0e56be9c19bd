"""The answers to one request, while they are generated."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from treeflash.decoding import Request
from treeflash.text.assembler import Assembler, Chunk


@dataclass(frozen=True, eq=False)
class Event:
    """What one iteration added to one answer.

    Attributes:
        index: of the answer.
        iteration: 0 for the prefill, then 1, 2, ...
        chunk: new text and tokens, with the step that made them: its tree, accepted path, log
            probabilities and times.
    """

    index: int
    iteration: int
    chunk: Chunk


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Numbers of tokens.

    Attributes:
        prompt_tokens: of the prompt, once.
        cached_tokens: of those, how many came from the prefix cache.
        completion_tokens: of all answers.
        drafted_tokens: that were drafted and verified.
        accepted_tokens: of those, how many the target accepted.
        iterations: forward passes after the prefill, summed over the answers.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    iterations: int


class Completion:
    """An asynchronous iterator of events; it ends when every answer has a finish reason.

    It belongs to the event loop that made it. The engine's thread feeds it.

    Attributes:
        requests: one for each answer, with the same prompt.
        texts: what was generated so far, one for each answer.
        submitted: when, by `time.perf_counter`.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        texts: Sequence[Assembler],
        cancel: Callable[[Completion], None],
        timeout: float,
    ) -> None:
        """Start without events.

        Args:
            requests: one for each answer.
            texts: without steps, one for each answer.
            cancel: is called when nobody waits for the answers any more.
            timeout: seconds until iteration raises a TimeoutError.
        """
        self.requests = tuple(requests)
        self.texts = tuple(texts)
        self.submitted = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._unfinished = len(self.texts)
        self._cancel = cancel

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt."""
        return self.texts[0].prompt_ids

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        steps = [[chunk.step for chunk in text.chunks] for text in self.texts]
        trees = [step for text in steps for step in text if step.tree is not None]
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=steps[0][0].cached_tokens if steps[0] else 0,
            completion_tokens=sum(len(c.token_ids) for text in self.texts for c in text.chunks),
            drafted_tokens=sum(len(step.tree) - 1 for step in trees if step.tree is not None),
            accepted_tokens=sum(len(step.path) - 1 for step in trees if step.path is not None),
            iterations=len(trees),
        )

    def __aiter__(self) -> Completion:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            TimeoutError: the time is over.
            Exception: what ended one of the answers.
        """
        if not self._unfinished:
            raise StopAsyncIteration
        async with asyncio.timeout_at(self._deadline):
            event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        self._unfinished -= event.chunk.finish_reason is not None
        return event

    async def run(self) -> None:
        """Wait for all answers; `texts` has them."""
        async for _ in self:
            pass

    def deliver(self, events: Sequence[Event | Exception]) -> None:
        """Add events, from any thread; nothing happens if the event loop is gone."""

        def put() -> None:
            for event in events:
                self._events.put_nowait(event)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(put)

    def cancel(self) -> None:
        """Stop generating; called after the end it does nothing."""
        self._cancel(self)

    def __enter__(self) -> Completion:
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self.cancel()
        return False
