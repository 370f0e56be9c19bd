"""Continuous batching: the scheduler decodes many sequences with one loaded pair.

`Scheduler.step` admits waiting requests, in order, while there is room, and then runs one
`Iteration` of all running sequences (`treeflash.decoding.iteration`). The scheduler owns what
outlives an iteration: the queue, the limits of memory, and the caches of states and of answers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from treeflash.config import Method
from treeflash.decoding.adaptive_budget import AdaptiveBudget, AdaptiveBudgets
from treeflash.decoding.disk_cache import CacheKey, Prefix, Restoration
from treeflash.decoding.interfaces import Backend, SequenceState, states_nbytes
from treeflash.decoding.iteration import Iteration, RunningSequence, concerns_few
from treeflash.decoding.loop import SCORED_TOKENS, Event, Step, decode_loop
from treeflash.decoding.merged_trees import Choices
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.request import Request, check
from treeflash.decoding.suffix import SuffixCache, SuffixIndex
from treeflash.errors import (
    ConfigError,
    MemoryInUseError,
    PromptError,
    device_error,
    is_of_earlier_work,
    is_out_of_memory,
)

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of a scheduler.

    Attributes:
        max_parallel: sequences that run at once; other requests wait in order.
        max_bytes: device memory for the states of sequences; None does not limit it.
        prefill_chunk: prompt tokens that run in one iteration while other sequences are decoded,
            which bounds how long these wait.
        lone_prefill_chunk: prompt tokens that run in one iteration while no sequence is decoded.
        snapshot_interval: prompt tokens between two snapshots of recurrent states.
    """

    max_parallel: int = 32
    max_bytes: int | None = None
    prefill_chunk: int = 256
    lone_prefill_chunk: int = 2048
    snapshot_interval: int = 2048


@dataclass(frozen=True, kw_only=True)
class PromptProgress:
    """How much of a prompt has run.

    Attributes:
        total: tokens of the prompt.
        cached: tokens that came from a cache, or from a sequence with the same prompt.
        done: tokens that need not run any more, the cached ones included.
        seconds: wall time of the forward passes so far.
    """

    total: int
    cached: int
    done: int
    seconds: float


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request that has not started; `leader` runs the same prompt and is to be forked."""

    request: Request
    leader: Request | None


class Scheduler:
    """Decodes many sequences with one loaded pair. It must not be called by two threads at once.

    Args:
        budgets: for the budget `auto`; they keep learning, and schedulers may share them. By
            default the costs of the target's forward passes are measured when they are needed.
        prefix_cache: takes the states of finished sequences and gives them to prompts with
            the same beginning. The caller closes it.
        suffix_cache: takes the tokens of finished answers, which answers with the same salt may
            copy.
    """

    def __init__(
        self,
        backend: Backend,
        config: SchedulerConfig | None = None,
        *,
        budgets: AdaptiveBudgets | None = None,
        prefix_cache: PrefixCache | None = None,
        suffix_cache: SuffixCache | None = None,
    ) -> None:
        self.backend = backend
        self.config = config or SchedulerConfig()
        self.budgets = budgets or AdaptiveBudgets()
        self.prefix_cache = prefix_cache
        self.suffix_cache = suffix_cache
        self._choices = Choices()
        self._waiting: list[_Waiting] = []
        # Sequences that have started, in order.
        self.sequences: list[RunningSequence] = []
        # The first waiting request gets its states from the disk.
        self._restoration: tuple[Request, Restoration] | None = None

    @property
    def busy(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self._waiting or self.sequences)

    @property
    def running(self) -> int:
        """Sequences that have started."""
        return len(self.sequences)

    @property
    def waiting(self) -> int:
        """Sequences that have not started."""
        return len(self._waiting)

    @property
    def prompts(self) -> dict[Request, PromptProgress]:
        """How much has run of the prompts of started sequences that have no token yet."""
        return {
            sequence.request: PromptProgress(
                total=len(sequence.request.prompt_ids),
                cached=sequence.cached,
                done=sequence.state.length,
                seconds=sum(sequence.seconds.values()),
            )
            for sequence in self.sequences
            if sequence.in_prompt
        }

    @property
    def committed_tokens(self) -> int:
        """Tokens of prompts and texts that the started sequences have committed."""
        return sum(sequence.state.length for sequence in self.sequences)

    @property
    def nbytes(self) -> int:
        """Device memory of the sequences that have started, bytes."""
        return sum(sequence.state.nbytes for sequence in self.sequences)

    def submit(self, request: Request) -> Request:
        """Add a sequence, which starts with one of the next iterations; returns the request.

        Raises a PromptError if the prompt is empty, too long, or has tokens outside the vocabulary,
        and a ConfigError if the method needs a drafter or head that was not loaded, or the sequence
        alone needs more memory than the limit.
        """
        self.check(request)
        self._waiting.append(_Waiting(request, None))
        return request

    def submit_group(
        self, requests: Sequence[Request], *, raises_limit: bool = False
    ) -> Sequence[Request]:
        """Add sequences with the same prompt, which is run once.

        It is run twice if some sequences are drafted for and others are not: a state that was
        opened for plain decoding cannot be drafted for. With `raises_limit`, a sequence that alone
        needs more memory than the limit raises the limit, so that it can be decoded alone. Raises
        what `submit` does, and then adds no sequence.
        """
        prompts = [(list(x.prompt_ids), x.digests) for x in requests]
        if any(prompt != prompts[0] for prompt in prompts):
            raise PromptError("the texts of a group must have the same prompt")
        limit = self.config.max_bytes
        if raises_limit and limit is not None:
            for request in requests:
                check(self.backend, request)
            limit = max(limit, *map(self.state_bytes, requests))
            self.config = replace(self.config, max_bytes=limit)
        for request in requests:
            self.check(request)
        leaders: dict[bool, Request] = {}
        for request in requests:
            leader = None if request.scores_prompt else leaders.get(request.config.drafts)
            self._waiting.append(_Waiting(request, leader))
            leaders.setdefault(request.config.drafts, request)
        return requests

    def check(self, request: Request) -> None:
        """Raise the error that `submit` would raise. Any thread may call it: no costs are timed."""
        check(self.backend, request)
        limit = self.config.max_bytes
        if limit is not None and (needed := self.state_bytes(request)) > limit:
            raise ConfigError(
                f"this sequence needs {needed / MIB:.3g} MiB for its KV cache and the limit is "
                f"{limit / MIB:.3g} MiB; shorten the prompt or lower max_tokens"
            )

    def state_bytes(self, request: Request) -> int:
        """Return the bytes that the state of a sequence may take."""
        return self.backend.state_nbytes(self._capacity(request), drafts=request.config.drafts)

    def run(self) -> Generator[Event, None, None]:
        """Iterate until all sequences are finished; yields their steps and errors.

        Sequences may be submitted and cancelled meanwhile. Closing the iterator drops all that are
        not finished.
        """
        try:
            while self.busy:
                yield from self.step()
        finally:
            self.close()

    def decode(
        self, requests: Iterable[Request] = ()
    ) -> Generator[tuple[Request, Step], None, None]:
        """Submit requests, then run until all sequences are finished; yields their steps.

        Raises what `submit` does before anything is decoded. An error that ends a sequence is
        raised and drops the others, as closing the iterator does.
        """
        requests = list(requests)
        for request in requests:
            self.check(request)
        self._waiting += [_Waiting(request, None) for request in requests]
        return self._steps()

    def _steps(self) -> Generator[tuple[Request, Step], None, None]:
        with closing(self.run()) as events:
            for request, event in events:
                if isinstance(event, Exception):
                    raise event
                yield request, event

    def step(self) -> list[Event]:
        """Run one iteration; returns the steps that it made, and errors that ended sequences."""
        events: list[Event] = []
        prefill_chunks = self.config.prefill_chunk, self.config.lone_prefill_chunk
        with self._trusted_states(events):
            self._admit(events)
            Iteration(self.backend, self.sequences, self._budget, prefill_chunks).run()
            lacks_memory = False
            for sequence in list(self.sequences):
                events += ((sequence.request, event) for event in sequence.events)
                finished = sequence.pending is None
                last = sequence.events[-1] if finished else None
                sequence.events.clear()
                if finished:
                    self._end(sequence, keep=not isinstance(last, Exception))
                lacks_memory |= isinstance(last, Exception) and is_out_of_memory(last)
            if lacks_memory and self.prefix_cache:  # later requests shall not fail, too
                self.prefix_cache.shrink(self.prefix_cache.nbytes // 2)
            self._store_states()
        return events

    @property
    def stores_states(self) -> bool:
        """Whether states wait to be copied to the disk tier of the prefix cache."""
        disk = None if self.prefix_cache is None else self.prefix_cache.disk
        return disk is not None and disk.has_unsaved

    def store_states(self) -> None:
        """Copy a few parts of states to the disk tier, if there are any, while nothing runs."""
        with self._trusted_states([]):
            self._store_states()

    def _store_states(self) -> None:
        if self.prefix_cache is not None and self.prefix_cache.disk is not None:
            self.prefix_cache.disk.copy_next()

    def cancel(self, request: Request, *, keep: bool = False) -> None:
        """Drop a sequence, if it is not finished; with `keep` the caches may take it nevertheless.

        Raises what a device raises while a state is copied; the sequences then are to be closed.
        """
        self._waiting = [x for x in self._waiting if x.request is not request]
        if self._restoration is not None and self._restoration[0] is request:
            self._drop_restoration()
        for sequence in [x for x in self.sequences if x.request is request]:
            try:
                self._end(sequence, keep=keep)
            except Exception as error:
                if is_of_earlier_work(error) and self.prefix_cache is not None:
                    self.prefix_cache.clear()  # see `_trusted_states`
                raise

    def close(self) -> None:
        """Drop all sequences."""
        self._waiting.clear()
        self._drop_restoration()
        for sequence in list(self.sequences):
            self._end(sequence)

    @contextmanager
    def _trusted_states(self, events: list[Event]) -> Iterator[None]:
        """End all sequences and forget all states if a call raises an error of earlier work.

        Any state may lack what the device should have written. Adds the events of the sequences.
        """
        try:
            yield
        except Exception as error:
            if not is_of_earlier_work(error):
                raise
            for sequence in list(self.sequences):
                if sequence.pending is not None:
                    sequence.fail(device_error(error))
                events += ((sequence.request, event) for event in sequence.events)
                self._end(sequence)
            self._drop_restoration()
            if self.prefix_cache is not None:
                self.prefix_cache.clear()

    def _admit(self, events: list[Event]) -> None:
        """Start waiting requests, in order, while there is room; adds errors of the start."""
        while self._waiting and len(self.sequences) < self.config.max_parallel:
            first = self._waiting[0]
            leader = self._leader(first)
            if leader is not None and leader.state.length < len(first.request.prompt_ids) - 1:
                break  # it is still running the prompt
            if not self._make_room(first.request, leader=leader):
                break
            del self._waiting[0]
            try:
                if first.request.config.is_adaptive:
                    self._budget(first.request.config.method)  # the state's size depends on it
                if leader is None and not self._restore(first):
                    self._waiting.insert(0, first)
                    break  # its state is still being read
                self._start(first, leader)
            except MemoryInUseError as error:
                self._drop_restoration()
                if self.prefix_cache:  # its least recently used state makes room
                    self.prefix_cache.shrink(self.prefix_cache.nbytes - 1)
                    self._waiting.insert(0, first)
                elif self.sequences:  # the next one that ends makes room
                    self._waiting.insert(0, first)
                    break
                else:
                    events.append((first.request, error))
            except Exception as error:
                if is_of_earlier_work(error):
                    self._waiting.insert(0, first)  # it has no state yet
                if not concerns_few(error):
                    raise
                self._drop_restoration()
                events.append((first.request, error))

    def _restore(self, waiting: _Waiting) -> bool:
        """Restore the beginning of a prompt from the disk; whether that has ended.

        Nothing is restored that the states in memory have. While no sequence is running, a call
        waits for the next part.
        """
        cache, request = self.prefix_cache, waiting.request
        if cache is None or cache.disk is None or request.scores_prompt:
            return True
        if self._restoration is None:
            prefix = self._prefix(request, request.prompt_ids[:-1])
            _, cached = self._find(request)
            if len(prefix.tokens) < cached + cache.disk.block:
                return True
            opened = partial(
                self.backend.open, self._capacity(request), drafts=request.config.drafts
            )
            self._restoration = request, cache.disk.restore(prefix, opened, cached)
        return self._restoration[1].advance(wait=not self.sequences)

    def _drop_restoration(self) -> None:
        if self._restoration is not None:
            self._restoration[1].close()
        self._restoration = None

    def _leader(self, waiting: _Waiting) -> RunningSequence | None:
        """Find the running sequence to fork, if it has not ended and its state can be shared."""
        for sequence in self.sequences:
            if sequence.request is waiting.leader:
                shareable = self._cache_key(sequence.request) == self._cache_key(waiting.request)
                return sequence if shareable else None
        return None

    def _find(self, request: Request) -> tuple[SequenceState | None, int]:
        """Find the state in the prefix cache to fork, and at which length; it counts as used.

        The prompt's last token is always run, because its logits give the first new token.
        """
        if self.prefix_cache is None or request.scores_prompt:
            return None, 0
        prefix = self._prefix(request, request.prompt_ids[:-1])
        return self.prefix_cache.find(prefix) or (None, 0)

    def _start(self, waiting: _Waiting, leader: RunningSequence | None) -> None:
        request = waiting.request
        source, cached = self._source(request, leader)
        capacity = self._capacity(request)
        restored = None if self._restoration is None else self._restoration[1].state
        self._restoration = None
        if restored is not None:
            state, cached = restored, restored.length
        elif source is not None and cached:
            state = source.fork(cached, capacity)
        else:
            state = self.backend.open(capacity, drafts=request.config.drafts)
        loop = decode_loop(
            *(request, state, self._limit(request), self.backend.vocab_size),
            cached_tokens=cached,
            disk_tokens=0 if restored is None else cached,
            choices=self._choices,
            shared=partial(self._finished_answers, request.cache_salt),
        )
        prompt = list(request.prompt_ids)
        interval = self.config.snapshot_interval
        sequence = RunningSequence(request, state, loop, prompt, cached, interval)
        is_leader = any(other.leader is request for other in self._waiting)
        sequence.shared = is_leader or self.prefix_cache is not None
        self.sequences.append(sequence)
        sequence.resume(None)

    def _source(
        self, request: Request, leader: RunningSequence | None
    ) -> tuple[SequenceState | None, int]:
        """Return the state that a sequence forks, and at which length; see `_find`."""
        if leader is None:
            return self._find(request)
        return leader.state, leader.state.restorable(len(request.prompt_ids) - 1)

    def _make_room(
        self,
        request: Request | None = None,
        copied: int = 0,
        leader: RunningSequence | None = None,
    ) -> bool:
        """Shrink the prefix cache until the running sequences' states fit; whether they do.

        Room is made for a `request` that is to start, perhaps as a fork of a `leader`, and for
        `copied` bytes of a state. What states share counts once.
        """
        if self.config.max_bytes is None:
            return True
        if request is None and self._restoration is not None:
            request, _ = self._restoration
        # A state may grow up to its capacity.
        requests = [sequence.request for sequence in self.sequences]
        requests += [] if request is None else [request]
        states = [(self._capacity(x), x.config.drafts) for x in requests]
        free = self.config.max_bytes - states_nbytes(self.backend, states) - copied
        free += sum(sequence.state.shared_nbytes for sequence in self.sequences)
        cached = 0 if self.prefix_cache is None else self.prefix_cache.nbytes
        if request is not None and cached > free:
            # The state that it continues is then the last to leave.
            source, length = self._source(request, leader)
            saved = 0 if source is None else source.shareable_nbytes(length)
            if source is not None and (leader is not None or source.nbytes <= free + saved):
                free += saved
        if free >= 0 and self.prefix_cache is not None:
            self.prefix_cache.shrink(free)
        return free >= 0

    def _end(self, sequence: RunningSequence, *, keep: bool = False) -> None:
        """Remove a sequence; with `keep` the caches may take its state and its answer."""
        if keep and self.suffix_cache is not None:
            request = sequence.request
            answer = sequence.tokens[len(request.prompt_ids) :]
            self.suffix_cache.add(request.cache_salt, answer)
        try:
            if keep and self.prefix_cache is not None:
                self._cache(sequence, self.prefix_cache)
        finally:
            self.sequences.remove(sequence)
            sequence.close()
            if self.prefix_cache is not None:  # what the sequence shared with its states is theirs
                self.prefix_cache.shrink(self.prefix_cache.max_bytes)

    def _cache(self, sequence: RunningSequence, cache: PrefixCache) -> None:
        """Copy the state of a finished sequence into the prefix cache, if there is memory."""
        # A stop may have cut off the tokens of the last positions.
        length = sequence.state.restorable(len(sequence.tokens))
        nbytes = self.backend.state_nbytes(length, drafts=sequence.config.drafts)
        if not length or nbytes > cache.max_bytes:
            return
        prefix = self._prefix(sequence.request, sequence.tokens[:length])
        cache.retire(prefix, sequence.state)
        if not self._make_room(copied=nbytes - sequence.state.shareable_nbytes(length)):
            return
        try:
            # A fork does not have room for more tokens.
            state = sequence.state.fork(length, length)
        except Exception as error:
            if not concerns_few(error):  # the answer is complete; only later prompts take longer
                raise
            return
        cache.put(prefix, state)

    def _finished_answers(self, salt: str) -> list[SuffixIndex]:
        """Return the indices over finished answers that a sequence may copy."""
        return [] if self.suffix_cache is None else self.suffix_cache.indices(salt)

    def _limit(self, request: Request) -> int:
        """Return the most new tokens."""
        room = self.backend.max_positions - len(request.prompt_ids)
        return min(request.config.max_tokens, room)

    def _capacity(self, request: Request) -> int:
        """Return the sequence's positions, the nodes of its largest tree included."""
        config = request.config
        nodes = 1
        if config.is_adaptive:
            nodes = self.budgets.largest
        elif config.speculates:
            nodes = int(config.budget)
        if request.scores_prompt:
            nodes = max(nodes, SCORED_TOKENS)
        return len(request.prompt_ids) + self._limit(request) + nodes

    def _cache_key(self, request: Request) -> CacheKey:
        """Return the key of sequences that share states; the loaded pair is a part of it."""
        return CacheKey(self.backend, request.config.drafts, request.cache_salt)

    def _prefix(self, request: Request, tokens: Sequence[int]) -> Prefix:
        return Prefix(self._cache_key(request), tokens, request.digests)

    def _budget(self, method: Method) -> AdaptiveBudget:
        return self.budgets.get(method, self.backend)


def decode(
    backend: Backend, request: Request, budgets: AdaptiveBudgets | None = None
) -> Generator[Step, None, None]:
    """Decode one sequence step by step. Closing the iterator early loses nothing already yielded.

    Raises what `Scheduler.submit` raises, and a NumericalError if a model produced values that are
    not finite. `budgets`, for the budget `auto`, keep learning and may be shared by sequences of
    the same pair; None measures new ones, which takes about a second. They never change a token.
    """
    return _steps(Scheduler(backend, budgets=budgets).decode([request]))


def _steps(events: Generator[tuple[Request, Step], None, None]) -> Generator[Step, None, None]:
    with closing(events):
        for _, step in events:
            yield step
