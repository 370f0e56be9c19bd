"""Decodes all requests together, in one thread that owns the models.

An endpoint calls `Engine.submit` in the event loop and reads the `Completion` that it returns. The
engine's thread runs the scheduler and delivers the new tokens of each iteration to the completions.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

from treeflash.config import GIB, DecodeConfig
from treeflash.decoding import PromptProgress, Request, Scheduler, SchedulerConfig, Step
from treeflash.decoding.interfaces import DeviceReport, device_report, warm_up
from treeflash.decoding.loop import Event
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.scheduler_thread import Mailbox, SchedulerThread
from treeflash.decoding.suffix import SuffixCache
from treeflash.decoding.turns import Turns
from treeflash.errors import ConfigError, is_device_lost, is_out_of_memory
from treeflash.language_model import LanguageModel
from treeflash.serving.acceptance import AcceptanceMonitor
from treeflash.serving.errors import (
    GPU_LOST,
    SERVER_FAILED,
    APIError,
    bad_request,
    shutting_down,
)
from treeflash.serving.metrics import Metrics
from treeflash.serving.settings import Settings
from treeflash.text.stream import Assembler, Chunk

logger = logging.getLogger("treeflash.serving")


@dataclass(frozen=True, eq=False)
class AnswerUpdate:
    """The text and tokens that one iteration added to one answer of a completion."""

    index: int
    iteration: int  # 0 for the prefill, then 1, 2, ...
    chunk: Chunk


@dataclass(frozen=True, eq=False)
class PromptUpdate:
    """How much of the prompt of one answer of a completion has run."""

    index: int
    progress: PromptProgress


Update: TypeAlias = AnswerUpdate | PromptUpdate | Exception
"""What the engine delivers to a completion; an error ends one of its answers."""


@dataclass
class Usage:
    """Counts of a completion; each prompt counts once, everything else for all answers."""

    prompt_tokens: int
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    disk_tokens: int = 0  # cached tokens that came from its disk tier
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    iterations: int = 0  # forward passes after the prefill
    # This counts iterations that verified a draft, by the number of accepted tokens.
    drafts: Counter[int] = field(default_factory=Counter)
    deepest_draft: int = 0


class Completion:
    """An asynchronous iterator of updates that ends when every answer has a finish reason.

    The answers to one prompt follow each other, and all prompts have the same number of answers. It
    belongs to the event loop that made it. The engine's thread delivers the updates. After
    `timeout` seconds, iteration raises a TimeoutError.

    Attributes:
        answers: the tokens and text so far, one for each prompt and answer.
        answers_per_prompt: number of answers to each prompt.
        submitted: the time of the submission, by the clock.
        usage: counts of the updates that were read.
    """

    def __init__(
        self,
        answers: Sequence[Assembler],
        prompts: int,
        cancel: Callable[[Completion], None],
        timeout: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.answers = tuple(answers)
        self.answers_per_prompt = len(self.answers) // prompts
        self.submitted = clock()
        self._clock = clock
        self._deadline = asyncio.get_running_loop().time() + timeout
        self._updates: Mailbox[Update] = Mailbox()
        self._first: AnswerUpdate | None = None  # the update that `prompt_updates` ended with
        self._unfinished = len(self.answers)
        self._cancel = cancel
        firsts = self.answers[:: self.answers_per_prompt]
        self.usage = Usage(prompt_tokens=sum(len(answer.prompt_ids) for answer in firsts))

    @property
    def seconds(self) -> float:
        """The time since the submission."""
        return self._clock() - self.submitted

    def __aiter__(self) -> Completion:
        return self

    async def __anext__(self) -> AnswerUpdate:
        """Return the next update; raises the error that ended one of the answers."""
        if not self._unfinished:
            raise StopAsyncIteration
        update: AnswerUpdate | PromptUpdate | None = self._first
        self._first = None
        while not isinstance(update, AnswerUpdate):
            update = await self._next()
        self._unfinished -= update.chunk.finish_reason is not None
        self._count(update)
        return update

    def _count(self, update: AnswerUpdate) -> None:
        counts, step = self.usage, update.chunk.step
        counts.completion_tokens += len(update.chunk.token_ids)
        if update.iteration == 0 and update.index % self.answers_per_prompt == 0:
            counts.cached_tokens += step.cached_tokens
            counts.disk_tokens += step.disk_tokens
        if step.tree is None:
            return
        drafted, accepted = len(step.tree) - 1, step.accepted_tokens
        counts.iterations += 1
        counts.drafted_tokens += drafted
        counts.accepted_tokens += accepted
        if drafted:
            counts.drafts[accepted] += 1
            counts.deepest_draft = max(counts.deepest_draft, int(step.tree.depths.max()))

    async def prompt_updates(self) -> AsyncIterator[PromptUpdate]:
        """Yield how much of the prompts has run, until the first tokens of an answer arrive."""
        while isinstance(update := await self._next(), PromptUpdate):
            yield update
        self._first = update

    async def _next(self) -> AnswerUpdate | PromptUpdate:
        async with asyncio.timeout_at(self._deadline):
            update = await self._updates.get()
        if isinstance(update, Exception):
            raise update
        return update

    async def wait(self) -> None:
        async for _ in self:
            pass

    def deliver(self, updates: Sequence[Update]) -> None:
        """Add updates, from any thread; nothing happens if the event loop is closed."""
        self._updates.put(updates)

    def __enter__(self) -> Completion:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop generating; nothing happens if all answers are finished."""
        self._cancel(self)


@dataclass(eq=False)
class _RunningAnswer:
    """An answer that is being generated: its tokens so far, and the time of the newest ones."""

    completion: Completion
    index: int
    assembler: Assembler
    tokens: int = 0
    newest: float = 0.0


class Engine:
    """Decodes requests in a `SchedulerThread`, which `start` starts.

    The models are loaded in this thread too, because frameworks bind streams and thread pools to
    threads. Other threads submit and cancel; both take effect between two iterations. Engines with
    the same `turns` never compute at once. The `clock` tells the seconds since some fixed moment.

    Attributes:
        draining: whether new requests are refused, because the server is about to end.
        device_lost: whether the server must end, because its GPU refuses further work.
        ran_out_of_memory: called, in the engine's thread, when an answer ends for want of memory.
    """

    def __init__(
        self,
        load: Callable[[], LanguageModel],
        settings: Settings,
        metrics: Metrics | None = None,
        turns: Turns | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics() if metrics is None else metrics
        self.draining = self.device_lost = False
        self.ran_out_of_memory: Callable[[], object] = lambda: None
        self._load = load
        self._clock = clock
        self._turns = Turns() if turns is None else turns
        # All threads use the unfinished answers of each completion, and the mean time of an answer.
        self._backlog: dict[Completion, int] = {}
        self._mean_seconds = 1.0
        # A signal's handler counts the unfinished answers, while its own thread may hold the lock.
        self._lock = threading.RLock()
        self.running_answers: dict[Request, _RunningAnswer] = {}
        self.thread = SchedulerThread(
            self._make_scheduler, self._add_events, self._fail_all, stays=True, turn=self._turns
        )

    @property
    def model(self) -> LanguageModel:
        self.thread.made.result()
        return self._model

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of the running and waiting answers; its thread alone may change it."""
        return self.thread.made.result()

    @property
    def ready(self) -> bool:
        return self.thread.is_alive() and self.thread.made.done() and not self.draining

    @property
    def loaded(self) -> bool:
        """Whether the models are loaded, or cannot be."""
        return self.thread.made.done()

    @property
    def unfinished(self) -> int:
        """The number of answers that are running or waiting."""
        with self._lock:
            return sum(self._backlog.values())

    def start(self) -> None:
        """Load the models and begin to decode; raises what loading raises."""
        self.thread.start()
        self.thread.made.result()

    async def start_aside(self) -> None:
        """Do what `start` does, while the event loop goes on.

        What ends a program, such as a KeyboardInterrupt, is raised as a RuntimeError: it ended the
        loading alone.
        """
        loop, made = asyncio.get_running_loop(), asyncio.Event()
        self.thread.start()
        self.thread.made.add_done_callback(lambda _: loop.call_soon_threadsafe(made.set))
        await made.wait()
        error = self.thread.made.exception()
        if isinstance(error, Exception):
            raise error
        if error is not None:
            raise RuntimeError(f"interrupted by {type(error).__name__}") from error

    def stop(self) -> None:
        """Drop all answers and end the thread."""
        self.draining = True
        self.thread.stop()

    def submit(self, answers: Sequence[Assembler], *, prompts: int) -> Completion:
        """Generate answers; call it in an event loop.

        The answers to one prompt follow each other, and the prompt is run once for all of them.
        There are as many answers to each of the `prompts`.

        Raises:
            PromptError, ConfigError: see `Scheduler.submit`.
            APIError: too many answers are waiting, or the server is about to end.
        """
        if not self.ready:
            raise shutting_down()
        requests = [answer.request() for answer in answers]
        for request in requests:
            self.scheduler.check(request)
        completion = Completion(
            answers, prompts, self._withdraw, self.settings.timeout, self._clock
        )
        self._reserve(completion)
        if not self.thread.call(partial(self._admit, completion, requests)):
            self._forget(completion)  # the thread has ended since it was asked
            raise shutting_down()
        return completion

    def shorten(self, prompt_ids: Sequence[int], config: DecodeConfig) -> DecodeConfig:
        """Limit the new tokens to as many as the memory has room for, at least one."""
        limit = self.scheduler.config.max_bytes
        assert limit is not None

        def state_bytes(count: int) -> int:
            shorter = replace(config, max_tokens=count)
            return self.scheduler.state_bytes(Request(prompt_ids=prompt_ids, config=shorter))

        fitting = bisect_right(range(1, config.max_tokens + 1), limit, key=state_bytes)
        return replace(config, max_tokens=max(fitting, 1))

    @property
    def _places(self) -> int:
        return self.settings.max_parallel + self.settings.max_queue

    def check_count(self, answers: int) -> None:
        """Raise an APIError if one request asks for more answers than can ever run and wait."""
        if answers > self._places:
            raise bad_request(
                f"the request asks for {answers} answers, and this server takes {self._places} at "
                "once; send fewer prompts, or a smaller n",
                "prompt",
            )

    def _reserve(self, completion: Completion) -> None:
        """Take places in the queue; raises an APIError if there are not enough."""
        limit, new = self._places, len(completion.answers)
        with self._lock:
            total = sum(self._backlog.values())
            if total + new > limit:
                seconds = math.ceil(self._mean_seconds * total / self.settings.max_parallel)
                raise APIError(
                    429,
                    f"{total} answers are being generated or waiting, and the limit is {limit}; "
                    f"try again in {seconds} seconds",
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            self._backlog[completion] = new

    def _forget(self, completion: Completion) -> None:
        """Give back the places in the queue that a completion still has."""
        with self._lock:
            self._backlog.pop(completion, None)

    def _withdraw(self, completion: Completion) -> None:
        """Cancel the unfinished answers of a completion; a later prompt may continue them."""
        self.thread.call(partial(self._drop, completion, keep=True))

    # The methods below run in the engine's thread.

    def _make_scheduler(self) -> Scheduler:
        self._model = self._load()
        settings = self.settings
        report = device_report(self._model.backend)
        max_bytes, cache_bytes = settings.memory(report.free_bytes, report.reserved_bytes)
        logger.info(
            "%.3g GiB for KV caches, %.3g GiB of them for the prefix cache",
            max_bytes / GIB,
            cache_bytes / GIB,
        )
        config = SchedulerConfig(max_parallel=settings.max_parallel, max_bytes=max_bytes)
        with self._turns:  # a graph is not captured, nor anything measured, while others compute
            started = self._clock()
            if prepared := warm_up(self._model.backend, config.max_parallel):
                seconds = self._clock() - started
                logger.info("%d passes prepared in %.1f s", prepared, seconds)
        disk = None
        if settings.prefix_cache_dir is not None:
            if not cache_bytes:
                raise ConfigError("prefix_cache_dir needs a prefix cache; raise max_memory_gb")
            disk_bytes = int(settings.prefix_cache_disk_gb * GIB)
            disk = self._model.disk_cache(Path(settings.prefix_cache_dir), disk_bytes)
        cache = PrefixCache(cache_bytes, disk) if cache_bytes else None
        copied_bytes = int(settings.suffix_cache_gb * GIB)
        copied = SuffixCache(copied_bytes) if copied_bytes else None
        with self._turns:
            scheduler = self._model.scheduler(config, cache, copied)
        self._acceptance = AcceptanceMonitor(self._model)
        self._report_device(device_report(self._model.backend))
        self.metrics.update_gauges(scheduler)
        return scheduler

    def _report_device(self, report: DeviceReport) -> None:
        """Report in the metrics and the log which kernels are not used."""
        self.metrics.set_device(report)
        for kernel, verdicts in report.kernels.items():
            for size, verdict in verdicts.items():
                if not verdict.startswith("used"):
                    logger.info("%s, %s: %s", kernel, size, verdict)

    def _admit(self, completion: Completion, requests: Sequence[Request]) -> None:
        answers = enumerate(completion.answers)
        try:
            for _, group in groupby(requests, key=lambda x: (list(x.prompt_ids), x.digests)):
                for request in self.scheduler.submit_group(list(group)):
                    self.running_answers[request] = _RunningAnswer(completion, *next(answers))
        except Exception as error:
            self._fail(completion, error)

    def _fail_all(self, error: Exception) -> None:
        logger.error("decoding failed; all requests are dropped", exc_info=error)
        if is_device_lost(error):
            self.device_lost = self.draining = self.thread.stopping = True
        for completion in {answer.completion for answer in self.running_answers.values()}:
            self._fail(completion, APIError(500, GPU_LOST if self.device_lost else SERVER_FAILED))

    def _add_events(self, events: list[Event]) -> None:
        """Deliver the steps of an iteration."""
        updates: dict[Completion, list[Update]] = {}
        for request, step in events:
            if (answer := self.running_answers.get(request)) is None:
                continue  # it was dropped with another answer of its completion, which failed
            try:
                update = self._add_step(answer, step)
            except Exception as error:  # other answers have their tokens nevertheless
                logger.warning("an answer ended with an error: %s", error)
                self._fail(answer.completion, error)
                continue
            updates.setdefault(answer.completion, []).append(update)
            if update.chunk.finish_reason is not None:
                if update.chunk.step.finish_reason is None:  # a stop string ended it
                    self._cancel(request, keep=True)
                self._finish(request)
        for request, progress in self.scheduler.prompts.items():
            if (answer := self.running_answers.get(request)) is not None:
                told = PromptUpdate(answer.index, progress)
                updates.setdefault(answer.completion, []).append(told)
        for completion, new in updates.items():
            completion.deliver(new)
        self.metrics.update_gauges(self.scheduler)
        self.metrics.update_acceptance(self._acceptance)

    def _add_step(self, answer: _RunningAnswer, step: Step | Exception) -> AnswerUpdate:
        """Add a step to the text of its answer; raises the error that ended the answer."""
        if isinstance(step, Exception):
            raise step
        assembler = answer.assembler
        length = len(assembler.prompt_ids) + answer.tokens
        self._acceptance.add(step, assembler.config.sampling, length)
        answer.tokens += len(step.tokens)
        iteration = len(assembler.chunks)
        update = AnswerUpdate(answer.index, iteration, assembler.add(step))
        self._count(answer, update)
        return update

    def _count(self, answer: _RunningAnswer, update: AnswerUpdate) -> None:
        now = self._clock()
        age = now - answer.completion.submitted
        if update.iteration == 0:
            self.metrics.count_prefill(update.chunk, len(answer.assembler.prompt_ids), age)
        else:
            self.metrics.count_iteration(update.chunk, now - answer.newest)
        answer.newest = now
        if update.chunk.finish_reason is not None:
            self.metrics.count_finish(update.chunk.finish_reason, age)

    def _finish(self, request: Request) -> None:
        """Forget a finished answer."""
        completion = self.running_answers.pop(request).completion
        with self._lock:
            self._mean_seconds += 0.1 * (completion.seconds - self._mean_seconds)
            self._backlog[completion] -= 1
            if not self._backlog[completion]:
                del self._backlog[completion]

    def _cancel(self, request: Request, *, keep: bool) -> None:
        with self._turns:  # a state that is kept is copied
            self.scheduler.cancel(request, keep=keep)

    def _drop(self, completion: Completion, *, keep: bool = False) -> None:
        """Cancel and forget all answers of a completion; see `Scheduler.cancel` for `keep`."""
        for request, answer in list(self.running_answers.items()):
            if answer.completion is completion:
                self._cancel(request, keep=keep)
                del self.running_answers[request]
        self._forget(completion)
        self.metrics.update_gauges(self.scheduler)

    def _fail(self, completion: Completion, error: Exception) -> None:
        self.metrics.count_failures(self._backlog[completion])
        self._drop(completion)
        completion.deliver([error])
        if is_out_of_memory(error):
            self.ran_out_of_memory()
