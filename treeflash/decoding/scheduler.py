"""Runs the decode loops of many texts, which join and leave between iterations."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from treeflash.config import AUTO, Method
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.iteration import Iteration
from treeflash.decoding.loop import Step, decode_loop
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.requests import Request, check
from treeflash.decoding.running_text import RunningText, Ticket
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.errors import ConfigError, PromptError

Event: TypeAlias = tuple[Ticket, Step | Exception]
"""A step of a text, or the error that ended it."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of a scheduler.

    Attributes:
        max_parallel: texts that run at once; further ones wait in order.
        max_bytes: device memory for the states of texts; None does not limit it.
        prefill_chunk: prompt tokens that run in one iteration while other texts are decoded, which
            bounds how long those wait.
        lone_prefill_chunk: the same while no text is decoded.
    """

    max_parallel: int = 32
    max_bytes: int | None = None
    prefill_chunk: int = 256
    lone_prefill_chunk: int = 2048


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A text that has not started; `leader` runs the same prompt and is to be forked."""

    ticket: Ticket
    request: Request
    leader: Ticket | None


class Scheduler:
    """Decodes many texts with one loaded pair. It must not be called by two threads at once."""

    def __init__(
        self,
        backend: Backend,
        config: SchedulerConfig | None = None,
        *,
        budgets: MutableMapping[Method, AdaptiveBudget] | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """Start without texts.

        Args:
            backend: a loaded pair.
            config: limits.
            budgets: for the budget `auto`, by method; they keep learning. One that is missing is
                added when it is needed, which measures the target's costs.
            prefix_cache: takes the states of finished texts and gives them to prompts that begin
                alike. The caller closes it.
        """
        self.backend = backend
        self.config = config or SchedulerConfig()
        self.budgets: MutableMapping[Method, AdaptiveBudget] = {} if budgets is None else budgets
        self.prefix_cache = prefix_cache
        self._waiting: list[_Waiting] = []
        self._running: list[RunningText] = []
        self._tickets = 0

    @property
    def busy(self) -> bool:
        """Whether any text is not finished."""
        return bool(self._waiting or self._running)

    @property
    def running(self) -> int:
        """Texts that have started."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Texts that have not started."""
        return len(self._waiting)

    @property
    def nbytes(self) -> int:
        """Device memory of the texts that have started, bytes."""
        return sum(text.state.nbytes for text in self._running)

    def submit(self, request: Request) -> Ticket:
        """Add a text, which starts with one of the next iterations.

        Raises:
            PromptError: the prompt is empty, too long, or has tokens outside the vocabulary.
            ConfigError: the method needs what was not loaded, or the text alone needs more memory
                than the limit.
        """
        return self._submit(request, None)

    def submit_group(self, requests: Sequence[Request]) -> list[Ticket]:
        """Add texts with the same prompt, which is run once.

        Once each for those that are drafted for and those that are not. Raises what `submit` does.
        """
        if any(list(x.prompt_ids) != list(requests[0].prompt_ids) for x in requests):
            raise PromptError("the texts of a group must have the same prompt")
        leaders: dict[bool, Ticket] = {}  # a state opened for plain decoding cannot be drafted for
        tickets = []
        for request in requests:
            tickets.append(self._submit(request, leaders.get(request.config.drafts)))
            leaders.setdefault(request.config.drafts, tickets[-1])
        return tickets

    def check(self, request: Request) -> None:
        """Raise what `submit` would raise. Any thread may call it, if the budgets are there."""
        check(self.backend, request.prompt_ids, request.config)
        limit = self.config.max_bytes
        if limit is not None and (needed := self.needed_bytes(request)) > limit:
            raise ConfigError(
                f"this text needs {needed} bytes for its state and the limit is {limit}; shorten "
                "the prompt or lower --max-tokens"
            )

    def needed_bytes(self, request: Request) -> int:
        """Device memory that the state of a text may take, bytes."""
        return self.backend.state_nbytes(self._capacity(request), drafts=request.config.drafts)

    def cancel(self, ticket: Ticket) -> None:
        """Drop a text, if it is not finished."""
        self._waiting = [text for text in self._waiting if text.ticket != ticket]
        for text in [text for text in self._running if text.ticket == ticket]:
            self._end(text)

    def close(self) -> None:
        """Drop all texts."""
        self._waiting.clear()
        for text in list(self._running):
            self._end(text)

    def step(self) -> list[Event]:
        """Run one iteration; returns the steps that it made, and errors that ended texts."""
        self._admit()
        prefill_tokens = self.config.prefill_chunk, self.config.lone_prefill_chunk
        Iteration(self.backend, self._running, self._budget, prefill_tokens).run()
        events: list[Event] = []
        for text in list(self._running):
            events += ((text.ticket, event) for event in text.events)
            finished = text.need is None
            failed = finished and isinstance(text.events[-1], Exception)
            text.events.clear()
            if finished:
                self._end(text, keep=not failed)
        return events

    def _submit(self, request: Request, leader: Ticket | None) -> Ticket:
        self.check(request)
        self._tickets += 1
        self._waiting.append(_Waiting(Ticket(self._tickets), request, leader))
        return Ticket(self._tickets)

    def _admit(self) -> None:
        """Start waiting texts, in order, while there is room."""
        while self._waiting and len(self._running) < self.config.max_parallel:
            first = self._waiting[0]
            leader = self._leader(first)
            if leader is not None and leader.state.length < len(first.request.prompt_ids) - 1:
                return  # it is still running the prompt
            if self.config.max_bytes is not None:
                # A state may grow up to its capacity.
                texts = [first.request, *(text.request for text in self._running)]
                free = self.config.max_bytes - sum(map(self.needed_bytes, texts))
                if free < 0:
                    return
                if self.prefix_cache is not None:
                    self.prefix_cache.shrink(free)
            del self._waiting[0]
            self._start(first, leader)

    def _leader(self, waiting: _Waiting) -> RunningText | None:
        """The running text to fork, if there still is one and its state has what is needed."""
        for text in self._running:
            if text.ticket == waiting.leader:
                return text if self._key(text.request) == self._key(waiting.request) else None
        return None

    def _start(self, waiting: _Waiting, leader: RunningText | None) -> None:
        request = waiting.request
        # At least one token is run: what follows the prompt is chosen from its output.
        known = request.prompt_ids[:-1]
        found = None if leader is None else (leader.state, leader.state.restorable(len(known)))
        if found is None and self.prefix_cache is not None:
            found = self.prefix_cache.find(self._key(request), known)
        cached = 0 if found is None else found[1]
        capacity = self._capacity(request)
        if found is not None and cached:
            state = found[0].fork(cached, capacity)
        else:
            state = self.backend.open(capacity, drafts=request.config.drafts)
        loop = decode_loop(
            request.prompt_ids,
            request.config,
            self._limit(request),
            self.backend.vocab_size,
            constraint=request.constraint,
            cached_tokens=cached,
        )
        text = RunningText(waiting.ticket, request, state, loop, list(request.prompt_ids))
        followed = any(other.leader == waiting.ticket for other in self._waiting)
        text.shared = followed or self.prefix_cache is not None
        self._running.append(text)
        text.resume(None)

    def _end(self, text: RunningText, *, keep: bool = False) -> None:
        """Remove a text; with `keep` a prefix cache may take its state."""
        self._running.remove(text)
        try:
            if keep and self.prefix_cache is not None:
                # A stop may have cut off the tokens of the last positions.
                length = text.state.restorable(len(text.tokens))
                if length:
                    state = text.state.fork(length, length)  # without the room for further tokens
                    self.prefix_cache.put(self._key(text.request), text.tokens[:length], state)
        finally:
            text.close()

    def _limit(self, request: Request) -> int:
        """New tokens at most."""
        room = self.backend.max_positions - len(request.prompt_ids)
        return min(request.config.max_tokens, room)

    def _capacity(self, request: Request) -> int:
        """Positions of the text, those of the largest tree included."""
        config = request.config
        nodes = 1
        if config.drafts:
            adapts = config.budget == AUTO
            nodes = self._budget(config.method).largest if adapts else int(config.budget)
        return len(request.prompt_ids) + self._limit(request) + nodes

    def _key(self, request: Request) -> Hashable:
        """What texts must share to share states: the loaded pair is one of its parts."""
        return self.backend, request.config.drafts, request.salt

    def _budget(self, method: Method) -> AdaptiveBudget:
        if method not in self.budgets:
            known = next(iter(self.budgets.values()), None)
            costs = known.costs if known else VerifyCosts.measure(self.backend)
            self.budgets[method] = AdaptiveBudget(costs)
        return self.budgets[method]
