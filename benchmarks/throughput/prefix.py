"""Time to the first token of a long prompt, most of which a prefix cache holds."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import cycle, islice
from statistics import median
from typing import Any

from benchmarks.throughput.systems import Prompts
from treeflash.config import DecodeConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.language_model import LanguageModel

CACHED = 0.95  # of the prompt
UNLIMITED = 2**62  # bytes


def measure(
    model: LanguageModel, prompts: Prompts, tokens: int, repeats: int = 3
) -> dict[str, Any]:
    """The median times with and without the cache, alternating, and their ratio.

    Args:
        model: a loaded pair, decoded by its best method.
        prompts: one after the other, they are repeated to make the long prompt.
        tokens: of the long prompt.
        repeats: measurements of each kind.
    """
    ids = list(islice(cycle([token for prompt in prompts for token in prompt]), tokens))
    config = DecodeConfig(method=model.best_method, max_tokens=2)
    cache = PrefixCache(UNLIMITED)

    def first_token(prompt: list[int], cache: PrefixCache | None) -> tuple[float, int]:
        """Seconds, and how many tokens came from the cache."""
        scheduler = Scheduler(model.backend, budgets=model.adaptive_budgets, prefix_cache=cache)
        started = time.perf_counter()
        scheduler.submit(Request(prompt_ids=prompt, config=config))
        while not (events := scheduler.step()):
            pass
        seconds = time.perf_counter() - started
        (_, event), *_ = events
        if isinstance(event, Exception):
            raise event
        scheduler.close()  # an unfinished text does not enter the cache
        return seconds, event.cached_tokens

    def fill(prompt: list[int]) -> None:
        """Put a prompt into the cache."""
        scheduler = Scheduler(model.backend, budgets=model.adaptive_budgets, prefix_cache=cache)
        request = Request(prompt_ids=prompt, config=replace(config, max_tokens=1))
        scheduler.submit(request)
        while scheduler.busy:
            for _, event in scheduler.step():
                if isinstance(event, Exception):
                    raise event

    fill(ids[: round(CACHED * tokens)])
    first_token(ids, None)  # warms up
    whole, cached = [], []
    for _ in range(repeats):
        whole.append(first_token(ids, None)[0])
        seconds, from_cache = first_token(ids, cache)
        cached.append(seconds)
    cache.close()
    return {
        "method": config.method,
        "prompt_tokens": tokens,
        "cached_tokens": from_cache,
        "first_token_s": median(whole),
        "cached_first_token_s": median(cached),
        "cached_to_whole": median(cached) / median(whole),
    }
