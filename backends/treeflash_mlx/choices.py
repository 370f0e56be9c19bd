"""The target's choices for several texts."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.choices import (
    Choice,
    Chosen,
    LogitEdits,
    LogProbs,
    shared_sampling,
    unpack,
)
from treeflash_mlx.sampler import choose as sample
from treeflash_mlx.topk import logsumexp, top_indices


def choose(
    logits: Sequence[mx.array | None], choices: Sequence[Choice | None]
) -> list[Chosen | None]:
    """What `treeflash.decoding.choices.choose` defines, for several texts.

    Texts with the same sampling are computed together, with one read from the device.

    Args:
        logits: (n, vocab) of each text; not used for a text without a choice.
        choices: of each text.

    Raises:
        NumericalError: a row's largest logit is not finite.
    """
    chosen: list[Chosen | None] = [None] * len(choices)
    groups: dict[object, list[tuple[int, mx.array, Choice]]] = {}
    for i, (rows, choice) in enumerate(zip(logits, choices, strict=True)):
        if choice is not None:
            assert rows is not None
            groups.setdefault(shared_sampling(choice), []).append((i, rows, choice))
    for texts in groups.values():
        edited = [_edited(rows, choice) for _, rows, choice in texts]
        sampling = texts[0][2].sampling
        keys = None
        if not sampling.greedy:
            keys = np.concatenate([c.keys for _, _, c in texts if c.keys is not None])
        tokens = sample(edited[0] if len(edited) == 1 else mx.concatenate(edited), sampling, keys)
        parts = np.split(tokens, np.cumsum([len(part) for part in edited])[:-1])
        for (i, rows, choice), part in zip(texts, parts, strict=True):
            k = choice.log_probs
            chosen[i] = Chosen(part, None if k is None else _log_probs(rows, part, k))
    return chosen


def _edited(logits: mx.array, choice: Choice) -> mx.array:
    """(n, vocab) logits with edits, -inf for tokens that are not allowed."""
    if choice.edits is not None:
        logits = _edit(logits.astype(mx.float32), choice.edits)
    if choice.allowed is not None:
        allowed = mx.array(unpack(choice.allowed, logits.shape[-1]))
        logits = mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))
    return logits


def _edit(logits: mx.array, edits: LogitEdits) -> mx.array:
    rows, tokens = mx.array(edits.rows), mx.array(edits.tokens)
    factors, found = mx.array(edits.factors), logits[rows, tokens]
    scaled = mx.where(found > 0, found / factors, found * factors)
    edited = mx.array(logits)  # an assignment changes the object, not the data that others share
    edited[rows, tokens] = scaled + mx.array(edits.additions)
    return edited


def _log_probs(logits: mx.array, tokens: NDArray[np.int32], k: int) -> LogProbs:
    logits = logits.astype(mx.float32)
    k = min(k, logits.shape[-1])
    best = top_indices(logits, k) if k else mx.zeros((len(tokens), 0), mx.int32)
    index = mx.concatenate([mx.array(tokens)[:, None], best], axis=1)
    values = mx.take_along_axis(logits, index, axis=1) - logsumexp(logits)
    mx.eval(best, values)
    read = np.array(values)
    return LogProbs(read[:, 0], np.array(best), read[:, 1:])
