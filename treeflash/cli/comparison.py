"""Compare a generation with plain decoding of its prompt: equality, margin and speedup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from treeflash.config import AUTO, SamplingConfig
from treeflash.decoding.sampling import noisy_logits, position_keys
from treeflash.text.generation import Comparison, Generation
from treeflash.text.stream import Stream

WARM_UP_TOKENS = 8
WARM_UP_PROMPT = 32
WARM_UP_BUDGET = 16
NEAR_TIE = 2.0
"""Largest margin that rounding explains, in spacings of the model's dtype: each of the two passes
may be off by one. The margins of 16 differences with SmolLM2-135M in bfloat16, greedy and sampled,
were at most 1.3."""
MANTISSA_BITS = {"float32": 23, "bfloat16": 7, "float16": 10}


def warm_up(stream: Stream) -> None:
    """Run a stream's method and plain decoding briefly, so that both are measured warm.

    A fixed budget replaces `auto`, which would learn from these runs.
    """
    prompt_ids = stream.assembler.prompt_ids[-WARM_UP_PROMPT:]
    config = replace(stream.assembler.config, max_tokens=WARM_UP_TOKENS, stop_token_ids=frozenset())
    if config.budget == AUTO:
        config = replace(config, budget=WARM_UP_BUDGET)
    for method in {config.method, "ar"}:
        stream.restart(replace(config, method=method), prompt_ids).run()


def compare(generation: Generation, stream: Stream) -> Comparison:
    """Decode the prompt of a finished stream without drafting, and compare the results."""
    plain = stream.restart(replace(stream.assembler.config, method="ar")).run()
    speedup = None
    if generation.tokens_per_s and plain.tokens_per_s:
        speedup = generation.tokens_per_s / plain.tokens_per_s
    pairs = list(zip_longest(generation.token_ids, plain.token_ids))
    first = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    comparison = Comparison(equal=first is None, first_difference=first, speedup=speedup)
    if first is None or None in pairs[first]:
        return comparison
    logits = stream.next_logits(plain.token_ids[:first])
    sampling = stream.assembler.config.sampling
    margin = decision_margin(
        logits, pairs[first], sampling, len(stream.assembler.prompt_ids) + first
    )
    rounding = spacing(float(np.abs(logits[list(pairs[first])]).max()), generation.dtype)
    rounds = generation.dtype != "float32" and generation.inexact is not None
    near_tie = rounds and margin <= NEAR_TIE * rounding
    return replace(comparison, margin=margin, spacing=rounding, near_tie=near_tie)


def decision_margin(
    logits: NDArray[np.float32], tokens: Sequence[int], sampling: SamplingConfig, position: int
) -> float:
    """The distance that (vocab,) raw logits would have to move for each token to be sampled.

    It is the distance of a token's logit from the largest, with the noise of sampling at an
    absolute position. For a token that the filters dropped, it is the distance of its logit from
    the smallest kept logit.
    """
    if sampling.greedy:
        return float(logits.max() - logits[list(tokens)].min())
    keys = position_keys(sampling.seed, np.array([position], np.int32))
    noisy = noisy_logits(logits[None], sampling, keys)[0]
    smallest_kept = logits[np.isfinite(noisy)].min()
    margins = np.where(np.isfinite(noisy), noisy.max() - noisy, smallest_kept - logits)
    return float(margins[list(tokens)].max())


def spacing(value: float, dtype: str) -> float:
    """The distance between neighbouring numbers of a dtype around a value."""
    _, exponent = np.frexp(value)
    return float(2.0 ** (int(exponent) - 1 - MANTISSA_BITS[dtype]))
