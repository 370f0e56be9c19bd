"""The target's choices for several texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.choices import MASK_BITS, Choice, Chosen, LogProbs, shared_sampling
from treeflash_cuda.cache import upload_all
from treeflash_cuda.graphs import Graphs
from treeflash_cuda.sampler import choose as sample
from treeflash_cuda.topk import topk


def choose(
    logits: Tensor,
    counts: Sequence[int],
    choices: Sequence[Choice | None],
    graphs: Graphs | None = None,
) -> list[Chosen | None]:
    """What `treeflash.decoding.choices.choose` defines, for several texts.

    Texts with the same sampling are computed together, with one read from a GPU; log probabilities
    of all texts take one more.

    Args:
        logits: (rows, vocab) of all texts.
        counts: rows of each text.
        choices: of each text; None for a text without rows.
        graphs: replay the arithmetic; None computes it.

    Raises:
        NumericalError: a row's largest logit is not finite.
    """
    parts = logits.split(list(counts))
    wanted = {i: choice for i, choice in enumerate(choices) if choice is not None}
    edited = _edited(parts, wanted)
    tokens: dict[int, NDArray[np.int32]] = {}
    for texts in _alike(wanted):
        sampling = wanted[texts[0]].sampling
        together = [edited.get(i, parts[i]) for i in texts]
        if len(texts) == len(wanted) and not edited:
            rows = logits  # saves a copy
        else:
            rows = together[0] if len(together) == 1 else torch.cat(together)
        keys = [own for i in texts if (own := wanted[i].keys) is not None]
        found = sample(rows, sampling, np.concatenate(keys) if keys else None, graphs)
        ends = np.cumsum([counts[i] for i in texts])
        tokens |= zip(texts, np.split(found, ends[:-1]), strict=True)
    log_probs = _log_probs(parts, tokens, wanted)
    return [
        Chosen(tokens[i], log_probs.get(i)) if i in wanted else None for i in range(len(choices))
    ]


def _alike(choices: dict[int, Choice]) -> list[list[int]]:
    """The texts, those with the same sampling together."""
    groups: dict[object, list[int]] = {}
    for i, choice in choices.items():
        groups.setdefault(shared_sampling(choice), []).append(i)
    return list(groups.values())


def _edited(logits: Sequence[Tensor], choices: dict[int, Choice]) -> dict[int, Tensor]:
    """(n, vocab) logits with edits, -inf for tokens that are not allowed; of texts with either."""
    arrays: list[NDArray[np.generic]] = []
    for choice in choices.values():
        if (edits := choice.edits) is not None:
            arrays += [edits.rows, edits.tokens]
            arrays += [edits.factors.view(np.int32), edits.additions.view(np.int32)]
        if choice.allowed is not None:
            arrays.append(choice.allowed.view(np.int32))
    uploaded = iter(upload_all(arrays, logits[0].device))
    edited = {}
    for i, choice in choices.items():
        if choice.edits is not None:
            place = next(uploaded).long(), next(uploaded).long()
            factors, additions = (next(uploaded).view(torch.float32) for _ in range(2))
            edited[i] = logits[i].float().clone()
            found = edited[i][place]
            edited[i][place] = torch.where(found > 0, found / factors, found * factors) + additions
        if choice.allowed is not None:
            allowed = _unpack(next(uploaded), logits[i].shape[-1])
            edited[i] = edited.get(i, logits[i]).masked_fill(~allowed, float("-inf"))
    return edited


def _unpack(words: Tensor, vocab_size: int) -> Tensor:
    """(n, vocab) bool of an int32 bitmask."""
    bits = words[:, :, None] >> torch.arange(MASK_BITS, device=words.device, dtype=torch.int32)
    return (bits & 1).bool().flatten(1)[:, :vocab_size]


def _log_probs(
    logits: Sequence[Tensor], tokens: dict[int, NDArray[np.int32]], choices: dict[int, Choice]
) -> dict[int, LogProbs]:
    """Of the texts that ask for them."""
    asked = {i: x.log_probs for i, x in choices.items() if x.log_probs is not None}
    if not asked:
        return {}
    index = upload_all([tokens[i] for i in asked], logits[0].device)
    parts = []
    for chosen, (i, k) in zip(index, asked.items(), strict=True):
        log_probs = logits[i].double().log_softmax(-1)
        own = log_probs.gather(-1, chosen[:, None].long())
        values, best = topk(log_probs, k) if k else (log_probs[:, :0], log_probs[:, :0])
        numbers = torch.cat([own, values], 1).float()
        parts.append(torch.cat([numbers.view(torch.int32), best.int()], 1))
    read = torch.cat([part.flatten() for part in parts]).cpu().numpy()
    ends = np.cumsum([part.numel() for part in parts])
    found = {}
    for i, part, flat in zip(asked, parts, np.split(read, ends[:-1]), strict=True):
        rows, k = flat.reshape(part.shape), part.shape[1] // 2
        numbers = rows[:, : k + 1].copy().view(np.float32)
        found[i] = LogProbs(numbers[:, 0], rows[:, k + 1 :], numbers[:, 1:])
    return found
