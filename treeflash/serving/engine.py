"""One thread that owns the models and decodes all requests together."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from treeflash.decoding import Request, Scheduler, SchedulerConfig, Ticket
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.language_model import LanguageModel
from treeflash.serving.completion import Completion, Event
from treeflash.serving.errors import APIError
from treeflash.serving.metrics import Metrics
from treeflash.serving.settings import GIB, Settings
from treeflash.text.assembler import Assembler

logger = logging.getLogger("treeflash.serving")


@dataclass(eq=False)
class _Text:
    """One answer that is being generated; `newest` is when its newest tokens were made."""

    completion: Completion
    index: int
    newest: float = 0.0

    @property
    def assembler(self) -> Assembler:
        return self.completion.texts[self.index]


@dataclass
class _Load:
    """Answers that are not finished, and how long the last ones took; shared by all threads."""

    texts: dict[Completion, int] = field(default_factory=dict)
    seconds: float = 1.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total(self) -> int:
        return sum(self.texts.values())


class Engine:
    """Decodes requests in a thread of its own.

    The models are loaded in this thread too, because frameworks bind streams and thread pools to
    threads. Other threads submit and cancel; both take effect between two iterations.

    Attributes:
        settings: limits.
        metrics: are counted here.
        draining: whether new requests are refused, because the server is about to end.
    """

    def __init__(
        self, load: Callable[[], LanguageModel], settings: Settings, metrics: Metrics
    ) -> None:
        """Prepare; `start` loads the models."""
        self.settings = settings
        self.metrics = metrics
        self.draining = False
        self._load_model = load
        self._load = _Load()
        self._loaded: Future[tuple[LanguageModel, Scheduler]] = Future()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._texts: dict[Ticket, _Text] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="treeflash-engine", daemon=True)

    @property
    def model(self) -> LanguageModel:
        """The loaded pair."""
        return self._loaded.result()[0]

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self._thread.is_alive() and self._loaded.done() and not self.draining

    @property
    def unfinished(self) -> int:
        """Answers that are running or waiting."""
        with self._load.lock:
            return self._load.total

    def start(self) -> None:
        """Load the models and begin to decode.

        Raises:
            TreeflashError, OSError: what loading raises.
        """
        self._thread.start()
        self._loaded.result()

    def stop(self) -> None:
        """Drop all texts and end the thread."""
        self.draining = True
        self._commands.put(self._stop)
        self._thread.join()

    def submit(self, requests: Sequence[Request], stop: Sequence[str] = ()) -> Completion:
        """Generate answers to a prompt; call it in an event loop.

        Args:
            requests: one for each answer, with the same prompt, which is run once.
            stop: strings to stop at.

        Raises:
            PromptError, ConfigError: see `Scheduler.submit`.
            APIError: 429, too many texts are waiting; 503, the server is about to end.
        """
        model, scheduler = self._loaded.result()
        if not self.ready:
            raise APIError(503, "the server is shutting down", code="shutting_down")
        for request in requests:
            scheduler.check(request)
        texts = [
            Assembler(model.backend, model.tokenizer, x.prompt_ids, x.config, stop)
            for x in requests
        ]
        completion = Completion(requests, texts, self._withdraw, self.settings.timeout)
        self._reserve(completion)
        self._commands.put(partial(self._submit, completion))
        return completion

    def _reserve(self, completion: Completion) -> None:
        """Take a place in the queue."""
        limit = self.settings.max_parallel + self.settings.max_queue
        with self._load.lock:
            waiting = self._load.total + len(completion.texts)
            if waiting > limit:
                turns = self._load.total / self.settings.max_parallel
                seconds = math.ceil(self._load.seconds * turns)
                raise APIError(
                    429,
                    f"{self._load.total} answers are being generated or waiting, and the limit is "
                    f"{limit}; try again in {seconds} seconds",
                    code="queue_full",
                    headers={"Retry-After": str(max(1, seconds))},
                )
            self._load.texts[completion] = len(completion.texts)

    def _withdraw(self, completion: Completion) -> None:
        """Cancel the answers of a completion that are not finished."""
        with self._load.lock:
            unfinished = self._load.texts.get(completion)
        if unfinished:
            self._commands.put(partial(self._drop, completion))

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            model = self._load_model()
            gib = self.settings.prefix_cache_gb
            cache = PrefixCache(int(gib * GIB)) if gib else None
            config = SchedulerConfig(
                max_parallel=self.settings.max_parallel,
                max_bytes=int(self.settings.max_memory_gb * GIB),
            )
            self._scheduler = model.scheduler(config, cache)
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result((model, self._scheduler))
        while not self._stopping:
            self._obey()
            if self._scheduler.busy:
                self._iterate()
        self._scheduler.close()
        if cache is not None:
            cache.close()

    def _obey(self) -> None:
        """Run the commands of other threads; wait for one if there is nothing to decode."""
        try:
            while True:
                self._commands.get(block=not self._scheduler.busy and not self._stopping)()
        except queue.Empty:
            pass

    def _stop(self) -> None:
        self._stopping = True

    def _submit(self, completion: Completion) -> None:
        try:
            tickets = self._scheduler.submit_group(completion.requests)
        except Exception as error:
            self._fail(completion, error)
            return
        for index, ticket in enumerate(tickets):
            self._texts[ticket] = _Text(completion, index)

    def _iterate(self) -> None:
        """Run one iteration and hand out what it made."""
        try:
            steps = self._scheduler.step()
        except Exception:
            logger.exception("an iteration failed; its texts are dropped")
            self._scheduler.close()
            for completion in {text.completion for text in self._texts.values()}:
                self._fail(completion, APIError(500, "the server failed; its log says why"))
            return
        events: dict[Completion, list[Event | Exception]] = {}
        for ticket, step in steps:
            text = self._texts.get(ticket)
            if text is None:  # dropped with another answer that failed
                continue
            if isinstance(step, Exception):
                logger.warning("a text ended with an error: %s", step)
                self._fail(text.completion, step)
                continue
            event = Event(text.index, len(text.assembler.chunks), text.assembler.add(step))
            self._count(text, event)
            events.setdefault(text.completion, []).append(event)
            if event.chunk.finish_reason is not None:
                self._scheduler.cancel(ticket)  # a stop string may have ended it
                self._finish(ticket)
        for completion, made in events.items():
            completion.deliver(made)
        self.metrics.observe(self._scheduler)

    def _count(self, text: _Text, event: Event) -> None:
        now = time.perf_counter()
        age = now - text.completion.submitted
        if event.iteration == 0:
            self.metrics.prefilled(event.chunk, len(text.completion.prompt_ids), age)
        else:
            self.metrics.decoded(event.chunk, now - text.newest)
        text.newest = now
        if event.chunk.finish_reason is not None:
            self.metrics.finished(event.chunk.finish_reason, age)

    def _finish(self, ticket: Ticket) -> None:
        """Forget an answer."""
        completion = self._texts.pop(ticket).completion
        seconds = time.perf_counter() - completion.submitted
        with self._load.lock:
            self._load.seconds += 0.1 * (seconds - self._load.seconds)
            self._load.texts[completion] -= 1
            if not self._load.texts[completion]:
                del self._load.texts[completion]

    def _drop(self, completion: Completion) -> None:
        """Forget all answers of a completion."""
        for ticket in [t for t, text in self._texts.items() if text.completion is completion]:
            self._scheduler.cancel(ticket)
            del self._texts[ticket]
        with self._load.lock:
            self._load.texts.pop(completion, None)
        self.metrics.observe(self._scheduler)

    def _fail(self, completion: Completion, error: Exception) -> None:
        self._drop(completion)
        self.metrics.failed(len(completion.texts))
        completion.deliver([error])
