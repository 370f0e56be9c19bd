"""Whatever other texts run beside it, and whenever they join or leave, a text stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from treeflash.config import METHODS, Budget, DecodeConfig, Method, Penalties
from treeflash.decoding import Request, Scheduler, SchedulerConfig, Step, Ticket
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.verify_costs import SIZES, VerifyCosts
from treeflash.testing.comparisons import assert_close
from treeflash.testing.pairs import PairMaker
from treeflash.testing.repeated import repeated
from treeflash.testing.samplings import SAMPLINGS
from treeflash.testing.texts import random_tokens

PENALTIES = Penalties(repetition=1.3, presence=0.4, frequency=0.2, logit_bias=((3, 1.5), (5, -9.0)))


class Alternating:
    """A constraint: even and odd tokens take turns."""

    def __init__(self, vocab_size: int) -> None:
        """Allow even tokens first."""
        tokens = np.arange(-(-vocab_size // 32) * 32)
        bits = [(tokens % 2 == parity) & (tokens < vocab_size) for parity in (0, 1)]
        self.masks = [np.packbits(x, bitorder="little").view("<u4") for x in bits]
        self.count = 0

    def allowed(self) -> NDArray[np.uint32]:
        """See `Constraint.allowed`."""
        return self.masks[self.count % 2]

    def advance(self, token: int) -> None:
        """See `Constraint.advance`."""
        assert token % 2 == self.count % 2
        self.count += 1

    def rollback(self, tokens: int) -> None:
        """See `Constraint.rollback`."""
        self.count -= tokens


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text of a schedule.

    Attributes:
        prompt_ids: the prompt.
        config: how to decode.
        constrained: whether `Alternating` holds.
        joins: the iteration that it joins before.
        cancelled: the iteration that it is cancelled before; None if it runs to its end.
    """

    prompt_ids: list[int]
    config: DecodeConfig
    constrained: bool
    joins: int
    cancelled: int | None

    def request(self, backend: Backend, **changes: Any) -> Request:
        """What to submit, with some of the configuration changed."""
        constraint = Alternating(backend.vocab_size) if self.constrained else None
        config = replace(self.config, **changes)
        return Request(prompt_ids=self.prompt_ids, config=config, constraint=constraint)


def schedules(vocab_size: int) -> st.SearchStrategy[list[Text]]:
    """Several texts, some with prompts that begin alike."""

    def build(seed: int, count: int) -> list[Text]:
        rng = np.random.default_rng(seed)
        shared = random_tokens(rng, vocab_size, 12)
        return [_random_text(rng, vocab_size, shared) for _ in range(count)]

    return st.builds(build, st.integers(0, 10**6), st.integers(2, 6))


def _random_text(rng: np.random.Generator, vocab_size: int, shared: list[int]) -> Text:
    def below(limit: int) -> int:
        return int(rng.integers(limit))

    budgets: tuple[Budget, ...] = 1, 4, 24, "auto"
    joins = below(12)
    return Text(
        prompt_ids=shared[: below(13)] + random_tokens(rng, vocab_size, 1 + below(19)),
        config=DecodeConfig(
            method=METHODS[below(len(METHODS))],
            budget=budgets[below(len(budgets))],
            max_tokens=1 + below(23),
            sampling=replace(list(SAMPLINGS.values())[below(len(SAMPLINGS))], seed=below(1000)),
            penalties=PENALTIES if rng.random() < 0.3 else Penalties(),
            log_probs=2 if rng.random() < 0.3 else None,
        ),
        constrained=bool(rng.random() < 0.5),
        joins=joins,
        cancelled=joins + 1 + below(19) if rng.random() < 0.25 else None,
    )


scheduler_configs = st.builds(
    SchedulerConfig,
    max_parallel=st.integers(1, 4),
    prefill_chunk=st.integers(1, 9),
    lone_prefill_chunk=st.integers(1, 30),
)


class ScheduleTests:
    """Mixin of `BackendSuite`."""

    @repeated
    @given(
        data=st.data(), config=scheduler_configs, cache_bytes=st.sampled_from([0, 40_000, 1 << 30])
    )
    def test_texts_of_a_schedule_equal_texts_alone(
        self,
        pair: PairMaker,
        representative: str,
        data: st.DataObject,
        config: SchedulerConfig,
        cache_bytes: int,
    ) -> None:
        backend = pair(representative).tested
        texts = data.draw(schedules(backend.vocab_size))
        cache = PrefixCache(cache_bytes)
        steps = run_schedule(scheduler_of(backend, config, cache), texts)
        cache.close()
        for text, own in zip(texts, steps, strict=True):
            emitted = [token for step in own for token in step.tokens]
            (alone,) = run_schedule(scheduler_of(backend), [replace(text, cancelled=None)])
            plain = plain_tokens(backend, text)
            assert [token for step in alone for token in step.tokens] == plain
            assert emitted == (plain if text.cancelled is None else plain[: len(emitted)])
            mine, theirs = chosen_log_probs(own), chosen_log_probs(alone)
            assert_close(mine, theirs[: len(mine)])

    @repeated
    @given(data=st.data())
    def test_a_group_shares_one_prefill(
        self, pair: PairMaker, representative: str, data: st.DataObject
    ) -> None:
        backend = pair(representative).tested
        texts = data.draw(schedules(backend.vocab_size))
        texts = [replace(text, prompt_ids=texts[0].prompt_ids) for text in texts]
        scheduler = scheduler_of(backend, SchedulerConfig(max_parallel=len(texts)))
        tickets = scheduler.submit_group([text.request(backend) for text in texts])
        steps = collect(scheduler)
        for number, (ticket, text) in enumerate(zip(tickets, texts, strict=True)):
            emitted = [token for step in steps[ticket] for token in step.tokens]
            assert emitted == plain_tokens(backend, text)
            # A text that has ended cannot be forked, nor one without a drafter's state.
            forkable = len(steps[tickets[0]]) > 1 and text.config.drafts == texts[0].config.drafts
            if number and forkable:
                assert steps[ticket][0].cached_tokens == len(text.prompt_ids) - 1


def scheduler_of(
    backend: Backend, config: SchedulerConfig | None = None, cache: PrefixCache | None = None
) -> Scheduler:
    """A scheduler whose budget `auto` takes another size whenever the number of texts changes."""
    costs = VerifyCosts({size: 1e-4 * (1 + 0.05 * size) for size in SIZES})
    budgets: dict[Method, AdaptiveBudget] = {x: AdaptiveBudget(costs) for x in METHODS}
    return Scheduler(backend, config, budgets=budgets, prefix_cache=cache)


def run_schedule(scheduler: Scheduler, texts: Sequence[Text]) -> list[list[Step]]:
    """Submit and cancel texts as they say; returns the steps of each."""
    tickets: dict[int, Ticket] = {}
    steps: dict[Ticket, list[Step]] = {}
    iteration = 0
    while len(tickets) < len(texts) or scheduler.busy:
        for number, text in enumerate(texts):
            if number not in tickets and text.joins <= iteration:
                tickets[number] = scheduler.submit(text.request(scheduler.backend))
            if text.cancelled is not None and text.cancelled == iteration:
                scheduler.cancel(tickets[number])
        for ticket, event in scheduler.step():
            assert not isinstance(event, Exception), event
            steps.setdefault(ticket, []).append(event)
        iteration += 1
    return [steps.get(tickets[number], []) for number in range(len(texts))]


def chosen_log_probs(steps: Sequence[Step]) -> NDArray[np.float32]:
    """Those of the emitted tokens; empty if they were not asked for."""
    parts = [step.log_probs.chosen for step in steps if step.log_probs is not None]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def collect(scheduler: Scheduler) -> dict[Ticket, list[Step]]:
    """Run until all texts are finished."""
    steps: dict[Ticket, list[Step]] = {}
    while scheduler.busy:
        for ticket, event in scheduler.step():
            assert not isinstance(event, Exception), event
            steps.setdefault(ticket, []).append(event)
    return steps


def plain_tokens(backend: Backend, text: Text) -> list[int]:
    """What plain decoding of the text alone emits."""
    scheduler = scheduler_of(backend)
    ticket = scheduler.submit(text.request(backend, method="ar", budget=1))
    return [token for step in collect(scheduler)[ticket] for token in step.tokens]
