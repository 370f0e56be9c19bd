"""Decoding one text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from treeflash.config import DecodeConfig
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import Step
from treeflash.decoding.requests import Request
from treeflash.decoding.scheduler import Scheduler


def decode(
    backend: Backend,
    prompt_ids: Sequence[int],
    config: DecodeConfig,
    adaptive_budget: AdaptiveBudget | None = None,
) -> Iterator[Step]:
    """Decode one text step by step. Closing the iterator early loses nothing already yielded.

    Args:
        backend: a loaded pair.
        prompt_ids: the prompt, at least one token.
        config: method, budget, limits, sampling.
        adaptive_budget: for the budget `auto`; it keeps learning and may be shared by texts of the
            same pair and method. None measures a new one, which takes about a second. It never
            changes a token.

    Raises:
        PromptError: the prompt is empty, too long, or has tokens outside the vocabulary.
        ConfigError: the method needs a drafter, or a head, that was not loaded.
        NumericalError: a model produced values that are not finite.
    """
    budgets = {} if adaptive_budget is None else {config.method: adaptive_budget}
    scheduler = Scheduler(backend, budgets=budgets)
    scheduler.submit(Request(prompt_ids=prompt_ids, config=config))
    return _steps(scheduler)


def _steps(scheduler: Scheduler) -> Iterator[Step]:
    try:
        while scheduler.busy:
            for _, event in scheduler.step():
                if isinstance(event, Exception):
                    raise event
                yield event
    finally:
        scheduler.close()
