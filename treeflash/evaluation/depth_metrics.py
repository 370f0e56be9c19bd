"""Distance between drafter and target at each depth, without and with the AR head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.interfaces import Backend
from treeflash.decoding.session import draft_anchors

Source: TypeAlias = Literal["marginal", "corrected"]
SOURCES: tuple[Source, ...] = ("marginal", "corrected")
BEST = (1, 2, 5)
METRICS = ("tvd", *(f"top{k}" for k in BEST), *(f"cover{k}" for k in BEST))
"""Metrics of a drafted distribution:

- `tvd`: total variation distance to the target's distribution, 0 to 1;
- `top1`, ...: whether the text's token is among the drafter's top 1, ... tokens;
- `cover1`, ...: the target's probability of the drafter's top 1, ... tokens.
"""


@dataclass
class DepthMetrics:
    """Metrics by depth, summed over anchors, the tokens after which blocks were drafted.

    Attributes:
        anchors: (D,) number of anchors by depth.
        sums: (D, len(METRICS)) by source; `corrected` is missing without an AR head.
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
    """Draft after every fourth token of the target's own text and compare each depth with it.

    The distributions of a depth have different conditions: the marginal one no token after the
    root, the corrected one the text's previous token, the target's all tokens of the text. The
    temperature applies to the target's distribution; 0 counts as 1.
    """
    assert backend.drafter_config is not None
    assert backend.drafter is not None
    depths = backend.drafter_config.depths
    metrics = DepthMetrics(np.zeros(depths, np.int64))
    for anchor in draft_anchors(backend, prompt_ids, text_ids, logits=True):
        assert anchor.logits is not None
        n = len(anchor.logits)  # the text may end within the block
        target = _probabilities(anchor.logits, temperature)
        drafted = {}
        if backend.drafter_config.has_marginals:
            drafted["marginal"] = backend.drafter.log_probs(anchor.block)
        if backend.head is not None:
            previous = np.pad(np.array(anchor.tokens[:n], np.int32), (0, depths - n), mode="edge")
            drafted["corrected"] = backend.head.log_probs(anchor.block, previous)
        following = np.array(anchor.tokens[1 : n + 1], np.int32)
        metrics.anchors[:n] += 1
        for source in SOURCES:
            if source in drafted:
                sums = metrics.sums.setdefault(source, np.zeros((depths, len(METRICS))))
                sums[:n] += _metrics(target, drafted[source][:n], following)
    return metrics


def _probabilities(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    scaled = (logits.astype(np.float64) - logits.max(-1, keepdims=True)) / (temperature or 1.0)
    exps = np.exp(scaled)
    normalised: NDArray[np.float64] = exps / exps.sum(-1, keepdims=True)
    return normalised


def _metrics(
    target: NDArray[np.float64], log_probs: NDArray[np.float32], tokens: NDArray[np.int32]
) -> NDArray[np.float64]:
    """The metrics of n depths, (n, len(METRICS)), from (n, vocab) distributions and (n,) tokens."""
    distance = 0.5 * np.abs(target - np.exp(log_probs)).sum(-1)
    count = min(max(BEST), log_probs.shape[1])
    best = np.argpartition(-log_probs, range(count))[:, :count]
    hits = (best == tokens[:, None]).cumsum(-1)
    mass = np.take_along_axis(target, best, -1).cumsum(-1)
    last = np.minimum(BEST, count) - 1
    return np.column_stack([distance, hits[:, last], mass[:, last]])
