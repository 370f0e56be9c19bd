"""Whether drafting changed the text, and what it gained: plain decoding of the same prompt."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

from treeflash.config import AUTO
from treeflash.text.generation import Comparison, Generation
from treeflash.text.stream import Stream

WARM_UP_TOKENS = 8
WARM_UP_PROMPT = 32
WARM_UP_BUDGET = 16


def warm_up(stream: Stream) -> None:
    """Run a stream's method and plain decoding briefly, so that neither pays for being first.

    Not with the budget `auto`, which would learn from it.
    """
    prompt_ids = stream.prompt_ids[-WARM_UP_PROMPT:]
    config = replace(stream.config, max_tokens=WARM_UP_TOKENS, stop_token_ids=frozenset())
    if config.budget == AUTO:
        config = replace(config, budget=WARM_UP_BUDGET)
    for method in {config.method, "ar"}:
        stream.again(replace(config, method=method), prompt_ids).run()


def compare(generation: Generation, stream: Stream) -> Comparison:
    """Decode the prompt of a finished stream plainly, and compare with what it gave.

    Args:
        generation: of the stream.
        stream: gives the prompt, the configuration and the loaded pair.
    """
    plain = stream.again(replace(stream.config, method="ar")).run()
    pairs = zip_longest(generation.token_ids, plain.token_ids)
    first_difference = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    speedup = None
    if generation.tokens_per_s and plain.tokens_per_s:
        speedup = generation.tokens_per_s / plain.tokens_per_s
    return Comparison(
        equal=first_difference is None, first_difference=first_difference, speedup=speedup
    )
