"""Sampling of the target's tokens, on a CPU and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import SamplingConfig
from treeflash.decoding import sampling as definition
from treeflash.decoding.sampling import (
    MASK_BITS,
    LogProbs,
    SampledTokens,
    SamplingParams,
    check_finite,
    shared_sampling,
)
from treeflash_cuda.numerics import (
    concatenate,
    gumbel,
    topk,
    topk_lower_bound,
    upload_all,
)

ROWS_AT_ONCE = 4
"""Rows computed together on a CPU: few enough to stay in its caches and in the allocator's pool."""
NOT_FINITE_TOKEN = -1
"""Stands for a token whose logit is not finite."""
LEAST = float(np.finfo(np.float32).tiny)
"""Probabilities below this are as good as 0: no noise makes such a token the sampled one."""
ARGMAX_BLOCK = 256
"""Tokens reduced together in the first step of an argmax, on a GPU."""


def sample_tokens(
    logits: Tensor, sampling: SamplingConfig, keys: NDArray[np.uint32] | None
) -> NDArray[np.int32]:
    """Sample a token per row on a CPU, as `treeflash.decoding.sampling.sample_tokens` does.

    The logits are (n, vocab), and the keys of the noise (n, 2); None when greedy. Raises a
    NumericalError if a row's largest logit is not finite.
    """
    if sampling.greedy:
        rows = logits.float().numpy()
        # NumPy's argmax takes a fraction of the time of torch's, and prefers NaN to all numbers.
        best = rows.argmax(-1)
        check_finite(np.isfinite(np.take_along_axis(rows, best[:, None], -1)).all())
        return best.astype(np.int32)
    assert keys is not None
    check_finite(logits.amax(-1).isfinite().all())
    starts = range(0, len(logits), ROWS_AT_ONCE)
    parts = [(logits[i : i + ROWS_AT_ONCE], sampling, keys[i : i + ROWS_AT_ONCE]) for i in starts]
    return np.concatenate([_sample_rows(*part) for part in parts]).astype(np.int32)


def _sample_rows(
    logits: Tensor, sampling: SamplingConfig, keys: NDArray[np.uint32]
) -> NDArray[np.int64]:
    scaled = logits.float() / sampling.temperature
    top_k = sampling.top_k if sampling.top_k < scaled.shape[-1] else 0
    if not top_k and sampling.top_p == 1 and sampling.min_p == 0:
        noise = gumbel(torch.from_numpy(keys.view(np.int32)), scaled.shape[-1])
        return (scaled - scaled.amax(-1, keepdim=True) + noise).numpy().argmax(-1)
    rows = zip(torch.softmax(scaled, -1).numpy(), keys, strict=True)
    return np.array([_sample_row(*row, top_k, sampling.top_p, sampling.min_p) for row in rows])


def _sample_row(
    probs: NDArray[np.float32], key: NDArray[np.uint32], top_k: int, top_p: float, min_p: float
) -> np.int64:
    """Sample one token by (vocab,) probabilities and the (2,) key of noise; `top_k` 0 is off."""
    best: float | np.floating = probs.max()
    # A mask or a low temperature may leave fewer than `top_k` tokens.
    edge: float | np.floating = max(min_p * best, LEAST)
    if top_k:
        floor: float | np.floating = topk_lower_bound(probs, top_k)
    else:
        total = probs.sum()
        # Top-p drops every token below an equal share of the mass that it drops.
        floor = min(max(edge, (1 - top_p) * total / len(probs)), best)
    tokens = np.flatnonzero(probs >= floor)
    probs = probs[tokens]
    if top_k:
        # Ties with the k-th token stay as well.
        inside = probs >= np.partition(probs, -top_k)[-top_k]
        tokens, probs = tokens[inside], probs[inside]
        total = probs.sum(dtype=np.float64)
    if top_p < 1:
        ranked = np.sort(probs)[::-1]
        mass_above = ranked.cumsum(dtype=np.float64) - ranked
        # The best token stays, even if the mass to keep rounds to 0.
        nucleus = max(int(np.count_nonzero(mass_above < top_p * total)), 1)
        edge = max(edge, ranked[nucleus - 1])
    inside = probs >= edge
    tokens, probs = tokens[inside], probs[inside]
    noise = definition.gumbel(key[None], tokens.astype(np.int32))[0]
    sampled: np.int64 = tokens[(np.log(probs) + noise).argmax()]
    return sampled


def finite_argmax(logits: Tensor) -> Tensor:
    """Return the (n,) best token of each row of (n, vocab) logits, the first one in a tie.

    It is -1 where the best logit is not finite.
    """
    n, vocab = logits.shape
    block = math.gcd(vocab, ARGMAX_BLOCK)
    blocks = logits.view(n, -1, block)
    # A maximum is several times as fast as an argmax: search only the block with the maximum.
    best, best_block = blocks.amax(-1).max(-1)
    candidates = blocks[torch.arange(n, device=logits.device), best_block]
    tokens = best_block * block + candidates.argmax(-1)
    return torch.where(best.isfinite(), tokens, NOT_FINITE_TOKEN)


@dataclass(eq=False)
class Logits:
    """Logits of several sequences."""

    parts: list[Tensor]  # (n, vocab) of each sequence
    # (n,) `finite_argmax` of the parts, where the forward pass has computed it.
    best: list[Tensor | None]
    whole: Tensor | None = None  # all parts, if they are one tensor

    @classmethod
    def split(cls, logits: Tensor, counts: Sequence[int]) -> Logits:
        """Split the (rows, vocab) logits with this number of rows of each sequence."""
        return cls(list(logits.split(list(counts))), [None] * len(counts), logits)

    @classmethod
    def of_passes(cls, passes: Sequence[tuple[Sequence[int], Logits]]) -> Logits:
        """Order the logits of passes by the indices of their sequences, which cover all."""
        found = [part for x, y in passes for part in zip(x, y.parts, y.best, strict=True)]
        _, parts, best = zip(*sorted(found, key=lambda part: part[0]), strict=True)
        return cls(list(parts), list(best))

    def joined(self, sequences: Iterable[int], edited: Mapping[int, Tensor]) -> Tensor:
        """Return the parts of some sequences as one tensor, with `edited` parts in their place."""
        parts = [edited.get(i, self.parts[i]) for i in sequences]
        if not edited and self.whole is not None and sum(map(len, parts)) == len(self.whole):
            return self.whole
        return concatenate(parts)


def sample(
    logits: Logits,  # the logits of all sequences
    # Each sequence has its own; it is None for a sequence without rows.
    all_params: Sequence[SamplingParams | None],
    # The operation of a GPU; None on a CPU.
    sample_rows: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> list[SampledTokens | None]:
    """Sample for several sequences, as `treeflash.decoding.sampling.sample` does for one.

    A GPU samples all sequences together, with one read from it. On a CPU those with the same
    sampling are computed together. Log probabilities of all sequences take one more read. Raises a
    NumericalError if a row's largest logit is not finite.
    """
    sampled = {i: params for i, params in enumerate(all_params) if params is not None}
    if not sampled:
        return [None] * len(all_params)
    parts = logits.parts
    edited = _edit_logits(parts, sampled)
    known = [
        best
        for i, params in sampled.items()
        if params.sampling.greedy and i not in edited and (best := logits.best[i]) is not None
    ]
    if len(known) == len(sampled):
        tokens = _read(concatenate(known), parts, sampled)
    elif sample_rows is not None:
        tokens = _sample_together(logits, sampled, edited, sample_rows)
    else:
        tokens = _sample_groups(logits, sampled, edited)
    log_probs = _log_probs(parts, tokens, sampled)
    return [
        SampledTokens(tokens[i], log_probs.get(i)) if i in sampled else None
        for i in range(len(all_params))
    ]


def _sample_together(
    logits: Logits,
    sampled: dict[int, SamplingParams],
    edited: dict[int, Tensor],  # logits that take the place of others
    sample_rows: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> dict[int, NDArray[np.int32]]:
    """Sample each sequence's tokens by an operation in which every row has its settings.

    Edited logits are float32, and have a call of their own: other rows would be twice as wide
    beside them.
    """
    groups: dict[torch.dtype, dict[int, SamplingParams]] = {}
    for i, params in sampled.items():
        groups.setdefault(edited.get(i, logits.parts[i]).dtype, {})[i] = params
    found = [_sample_group(logits, group, edited, sample_rows) for group in groups.values()]
    order = [i for group in groups.values() for i in group]
    return _read(concatenate(found), logits.parts, order)


def _sample_group(
    logits: Logits,
    sampled: dict[int, SamplingParams],
    edited: dict[int, Tensor],
    sample_rows: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Sample the (rows,) tokens of sequences whose logits have one dtype."""
    rows = logits.joined(sampled, {i: x for i, x in edited.items() if i in sampled})
    keys = np.zeros((len(rows), 2), np.int32)
    settings = np.zeros((len(rows), 4), np.float32)
    start = 0
    for i, params in sampled.items():
        part, sampling = slice(start, start + len(logits.parts[i])), params.sampling
        start = part.stop
        # A float32 does not hold every number that a request may name.
        filters = min(sampling.top_k, rows.shape[-1]), sampling.top_p, sampling.min_p
        settings[part] = 0 if sampling.greedy else sampling.temperature, *filters
        if params.keys is not None:
            keys[part] = params.keys.view(np.int32)
    uploaded = upload_all([keys, settings.view(np.int32)], rows.device)
    return sample_rows(rows, uploaded[0], uploaded[1].view(torch.float32))


def _read(
    tokens: Tensor, parts: Sequence[Tensor], sequences: Iterable[int]
) -> dict[int, NDArray[np.int32]]:
    """Read the (rows,) tokens of some sequences; `NOT_FINITE_TOKEN` raises a NumericalError."""
    numbers = tokens.cpu().numpy().astype(np.int32)
    check_finite((numbers >= 0).all())
    return _split(numbers, parts, sequences)


def _split(
    tokens: NDArray[np.int32], parts: Sequence[Tensor], sequences: Iterable[int]
) -> dict[int, NDArray[np.int32]]:
    """Return the (rows,) tokens of some sequences by sequence."""
    ends = np.cumsum([len(parts[i]) for i in sequences])
    return dict(zip(sequences, np.split(tokens, ends[:-1]), strict=True))


def _sample_groups(
    logits: Logits, sampled: dict[int, SamplingParams], edited: dict[int, Tensor]
) -> dict[int, NDArray[np.int32]]:
    """Sample the tokens of each sequence, those with the same sampling together."""
    groups: dict[object, list[int]] = {}
    for i, params in sampled.items():
        groups.setdefault(shared_sampling(params.sampling), []).append(i)
    tokens: dict[int, NDArray[np.int32]] = {}
    for sequences in groups.values():
        rows = logits.joined(sequences, edited)
        keys = [keys for i in sequences if (keys := sampled[i].keys) is not None]
        sampling = sampled[sequences[0]].sampling
        found = sample_tokens(rows, sampling, np.concatenate(keys) if keys else None)
        tokens |= _split(found, logits.parts, sequences)
    return tokens


def _edit_logits(
    logits: Sequence[Tensor], all_params: dict[int, SamplingParams]
) -> dict[int, Tensor]:
    """Return (n, vocab) logits of the sequences with edits or forbidden tokens, which get -inf."""
    arrays: list[NDArray[np.generic]] = []
    for params in all_params.values():
        if (edits := params.edits) is not None:
            arrays += [edits.rows, edits.tokens]
            arrays += [edits.factors.view(np.int32), edits.additions.view(np.int32)]
        if params.allowed is not None:
            arrays.append(params.allowed.view(np.int32))
    uploaded = iter(upload_all(arrays, logits[0].device))
    edited = {}
    for i, params in all_params.items():
        if params.edits is not None:
            index = next(uploaded).long(), next(uploaded).long()
            factors, additions = (next(uploaded).view(torch.float32) for _ in range(2))
            edited[i] = logits[i].float().clone()
            values = edited[i][index]
            scaled = torch.where(values > 0, values / factors, values * factors)
            edited[i][index] = scaled + additions
        if params.allowed is not None:
            allowed = _unpack(next(uploaded), logits[i].shape[-1])
            edited[i] = edited.get(i, logits[i]).masked_fill(~allowed, float("-inf"))
    return edited


def _unpack(words: Tensor, vocab_size: int) -> Tensor:
    """Return the (n, vocab) bool of an int32 bitmask."""
    bits = words[:, :, None] >> torch.arange(MASK_BITS, device=words.device, dtype=torch.int32)
    return (bits & 1).bool().flatten(1)[:, :vocab_size]


def _log_probs(
    logits: Sequence[Tensor],
    tokens: dict[int, NDArray[np.int32]],
    all_params: dict[int, SamplingParams],
) -> dict[int, LogProbs]:
    """Return the log probabilities of the sequences whose parameters ask for them."""
    sizes = {i: x.log_probs for i, x in all_params.items() if x.log_probs is not None}
    if not sizes:
        return {}
    uploaded = upload_all([tokens[i] for i in sizes], logits[0].device)
    parts = []
    for sampled, (i, k) in zip(uploaded, sizes.items(), strict=True):
        log_probs = logits[i].double().log_softmax(-1)
        selected = log_probs.gather(-1, sampled[:, None].long())
        values, best = topk(log_probs, k) if k else (log_probs[:, :0], log_probs[:, :0])
        numbers = torch.cat([selected, values], 1).float()
        parts.append(torch.cat([numbers.view(torch.int32), best.int()], 1))
    flat = torch.cat([part.flatten() for part in parts]).cpu().numpy()
    ends = np.cumsum([part.numel() for part in parts])
    results = {}
    for i, part, flat_part in zip(sizes, parts, np.split(flat, ends[:-1]), strict=True):
        rows, k = flat_part.reshape(part.shape), part.shape[1] // 2
        floats = rows[:, : k + 1].copy().view(np.float32)
        results[i] = LogProbs(floats[:, 0], rows[:, k + 1 :], floats[:, 1:])
    return results
