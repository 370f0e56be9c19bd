"""Distance between drafter and target at each depth, without and with the AR head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.interfaces import Backend
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree

Source: TypeAlias = Literal["marginal", "corrected"]
SOURCES: tuple[Source, ...] = ("marginal", "corrected")
BEST = (1, 2, 5)
METRICS = ("tvd", *(f"top{k}" for k in BEST), *(f"cover{k}" for k in BEST))
"""Metrics of a drafted distribution:

- `tvd`: its total variation distance to the target's, 0 to 1;
- `top1`, ...: whether the text's token is among its top 1, ... tokens;
- `cover1`, ...: the target's probability of its top 1, ... tokens.
"""
STRIDE = 4


@dataclass
class DepthMetrics:
    """Metrics by depth, summed over anchors: positions of texts that served as the root.

    Attributes:
        anchors: (D,) number of anchors by depth.
        sums: (D, len(METRICS)) by source; without an AR head there is no `corrected`.
    """

    anchors: NDArray[np.int64]
    sums: dict[Source, NDArray[np.float64]] = field(default_factory=dict)

    def __add__(self, other: DepthMetrics) -> DepthMetrics:
        sums = {source: sums + other.sums[source] for source, sums in self.sums.items()}
        return DepthMetrics(self.anchors + other.anchors, sums)

    def records(self) -> Iterator[dict[str, Any]]:
        """The mean metrics of each depth with anchors, as `{metric}_{source}`."""
        for i in np.flatnonzero(self.anchors).tolist():
            record: dict[str, Any] = {"depth": i + 1, "anchors": int(self.anchors[i])}
            for n, metric in enumerate(METRICS):
                for source in SOURCES:
                    sums = self.sums.get(source)
                    mean = None if sums is None else float(sums[i, n] / self.anchors[i])
                    record[f"{metric}_{source}"] = mean
            yield record


def measure_depth_metrics(
    backend: Backend, prompt_ids: Sequence[int], text_ids: Sequence[int], temperature: float
) -> DepthMetrics:
    """Draft after every fourth token of a text and compare each depth with the target.

    The marginal distribution of a depth is conditioned on no token between the root and it, the
    corrected one on the text's previous token, the target on all of them.

    Args:
        backend: a loaded pair.
        prompt_ids: the prompt.
        text_ids: the target's own continuation.
        temperature: of the target's distribution; 0 counts as 1, so that it is a distribution.
    """
    assert backend.drafter_config is not None
    depths = backend.drafter_config.depths
    metrics = DepthMetrics(np.zeros(depths, np.int64))
    assert backend.drafter is not None
    state = TextSession(backend, drafts=True, capacity=len(prompt_ids) + len(text_ids) + depths)
    state.extend(prompt_ids)
    text = np.array(text_ids, np.int32)
    for start in range(0, len(text) - 1, min(STRIDE, depths)):
        # The text may end within the block: the last depths are then not compared.
        previous, following = text[start:-1][:depths], text[start + 1 :][:depths]
        n = len(previous)
        target = _probabilities(state.logits(DraftTree.chain(previous)), temperature)
        block = state.draft(int(previous[0]))
        drafted = {"marginal": backend.drafter.log_probs(block)}
        if backend.head is not None:
            padded = np.pad(previous, (0, depths - n), mode="edge")
            drafted["corrected"] = backend.head.log_probs(block, padded)
        metrics.anchors[:n] += 1
        for source in SOURCES:
            if source in drafted:
                sums = metrics.sums.setdefault(source, np.zeros((depths, len(METRICS))))
                sums[:n] += _metrics(target, drafted[source][:n], following)
        state.commit(np.arange(min(STRIDE, n), dtype=np.int32))
    state.close()
    return metrics


def _probabilities(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    scaled = (logits.astype(np.float64) - logits.max(-1, keepdims=True)) / (temperature or 1.0)
    exps = np.exp(scaled)
    normalised: NDArray[np.float64] = exps / exps.sum(-1, keepdims=True)
    return normalised


def _metrics(
    target: NDArray[np.float64], log_probs: NDArray[np.float32], tokens: NDArray[np.int32]
) -> NDArray[np.float64]:
    """The metrics of n depths, (n, len(METRICS)).

    Args:
        target: (n, vocab) probabilities of the target.
        log_probs: (n, vocab) drafted log probabilities, nats.
        tokens: (n,) tokens of the text.
    """
    distance = 0.5 * np.abs(target - np.exp(log_probs)).sum(-1)
    kept = min(max(BEST), log_probs.shape[1])
    best = np.argpartition(-log_probs, range(kept))[:, :kept]
    found = (best == tokens[:, None]).cumsum(-1)
    mass = np.take_along_axis(target, best, -1).cumsum(-1)
    last = np.minimum(BEST, kept) - 1
    return np.column_stack([distance, found[:, last], mass[:, last]])
