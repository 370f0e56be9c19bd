"""Many texts at once: one scheduler, and an assembler for each text."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from treeflash.config import AUTO, Method, is_whole
from treeflash.decoding import Request, Scheduler, SchedulerConfig, Ticket, check
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Backend
from treeflash.errors import ConfigError
from treeflash.text.assembler import Assembler

Parallel: TypeAlias = int | Literal["auto"]
"""How many texts to decode at once."""
AUTO_TEXTS = 16
"""Texts that `auto` decodes at once: 8 and 32 gave fewer tokens per second of processor time with
SmolLM2-135M in bfloat16 on a CPU (62 and 65, against 74; 32 prompts)."""
AUTO_BYTES = 4 << 30
"""Device memory for the keys and values of these texts; `auto` decodes fewer if they need more."""


def scheduler_config(parallel: Parallel) -> SchedulerConfig:
    """The limits of a scheduler that decodes so many texts at once.

    Raises:
        ConfigError: the number is below 1.
    """
    if parallel == AUTO:
        return SchedulerConfig(max_parallel=AUTO_TEXTS, max_bytes=AUTO_BYTES)
    if not is_whole(parallel, 1):
        raise ConfigError(f"parallel must be auto, or 1 or more, got {parallel!r}")
    return SchedulerConfig(max_parallel=int(parallel))


def submit(scheduler: Scheduler, requests: Sequence[Request]) -> list[Ticket]:
    """Add texts with the same prompt.

    A text that needs more than the memory limit raises the limit: it can then be decoded, alone.

    Raises:
        PromptError, ConfigError: see `Scheduler.submit`.
    """
    for request in requests:
        check(scheduler.backend, request.prompt_ids, request.config)
    limit = scheduler.config.max_bytes
    if limit is not None:
        needed = max(map(scheduler.needed_bytes, requests))
        scheduler.config = replace(scheduler.config, max_bytes=max(limit, needed))
    return scheduler.submit_group(requests)


class ManyTexts:
    """Texts that are decoded together. They join and leave at any time."""

    def __init__(
        self,
        backend: Backend,
        parallel: Parallel,
        budgets: MutableMapping[Method, AdaptiveBudget],
    ) -> None:
        """Start without texts.

        Args:
            backend: a loaded pair.
            parallel: texts that run at once; further ones wait in order.
            budgets: for the budget `auto`, by method; they keep learning.

        Raises:
            ConfigError: `parallel` is below 1.
        """
        self._scheduler = Scheduler(backend, scheduler_config(parallel), budgets=budgets)
        self._texts: dict[Ticket, Assembler] = {}

    @property
    def busy(self) -> bool:
        """Whether any text is not finished."""
        return self._scheduler.busy

    @property
    def has_room(self) -> bool:
        """Whether one more text would not have to wait for another, as far as numbers go."""
        return len(self._texts) < self._scheduler.config.max_parallel

    def submit(self, texts: Sequence[Assembler]) -> None:
        """Add texts with the same prompt, which is run once.

        Raises:
            PromptError: the prompt is empty, too long, or has tokens outside the vocabulary.
            ConfigError: the method needs what was not loaded.
        """
        requests = [Request(prompt_ids=text.prompt_ids, config=text.config) for text in texts]
        tickets = submit(self._scheduler, requests)
        self._texts |= zip(tickets, texts, strict=True)

    def step(self) -> list[tuple[Assembler, Exception | None]]:
        """Run one iteration; returns the texts that it finished, and the errors that ended them."""
        finished: list[tuple[Assembler, Exception | None]] = []
        for ticket, event in self._scheduler.step():
            text = self._texts[ticket]
            error = event if isinstance(event, Exception) else None
            if isinstance(event, Exception) or text.add(event).finish_reason is not None:
                self._scheduler.cancel(ticket)  # a stop string may have ended it
                del self._texts[ticket]
                finished.append((text, error))
        return finished

    def close(self) -> None:
        """Drop all texts."""
        self._scheduler.close()
        self._texts.clear()
