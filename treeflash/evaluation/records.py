"""The results of an evaluation as records, in the form that `--json` writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import Method
from treeflash.decoding.statistics import mean
from treeflash.evaluation.bootstrap import interval, resamples
from treeflash.evaluation.rejections import REASONS
from treeflash.evaluation.run import Case, Sample

Record: TypeAlias = dict[str, Any]
Samples: TypeAlias = Mapping[str, Sequence[Sample]]
Efficiencies: TypeAlias = Mapping[Case, NDArray[np.float64]]

MEAN = "mean"
"""The name of the mean over sets, each with the same weight."""
METHOD: Method = "treeflash"
BASELINE: Method = "ddtree"


def compute_records(samples: Samples, seed: int) -> dict[str, list[Record]]:
    """Aggregate finished samples.

    Intervals are 95 % bootstrap intervals over prompts; all cases share the resampled prompts.

    Args:
        samples: by set, at least one each, all with the same cases.
        seed: random seed of the bootstrap.

    Returns:
        - `rows`, by set and case: tokens per target forward pass after the prefill;
        - `ratios`, by set and budget: TreeFlash's block efficiency over DDTree's;
        - `depths`, by set and depth: the means of `treeflash.evaluation.depth_metrics.METRICS`;
        - `lost`, by set and drafting case: iterations by rejection reason;
        - `accepted`, by set and drafting case: iterations by accepted length, 1, 2, ...
    """
    rng = np.random.default_rng(seed)
    efficiencies = {name: _efficiencies(own, rng) for name, own in samples.items()}
    efficiencies[MEAN] = {
        case: np.mean([own[case] for own in efficiencies.values()], 0)
        for case in next(iter(efficiencies.values()))
    }
    every = [sample for own in samples.values() for sample in own]
    return {
        "rows": [
            row
            for name, own in efficiencies.items()
            for row in _rows(name, own, samples.get(name, every))
        ],
        "ratios": [row for name, own in efficiencies.items() for row in _ratios(name, own)],
        "depths": _depth_metrics(samples),
        "lost": [row for name, own in samples.items() for row in _rejections(name, own)],
        "accepted": [row for name, own in samples.items() for row in _accepted(name, own)],
    }


def _efficiencies(samples: Sequence[Sample], rng: np.random.Generator) -> Efficiencies:
    """Block efficiencies by case, (1 + RESAMPLES,): measured, then for the resampled prompts."""
    drawn = resamples(len(samples), rng)
    found = {}
    for case in samples[0].runs:
        lengths = [sample.runs[case].accepted_lengths for sample in samples]
        tokens, forwards = np.array([(sum(own), len(own)) for own in lengths]).T
        found[case] = tokens[drawn].sum(1) / forwards[drawn].sum(1)
    return found


def _rows(name: str, efficiencies: Efficiencies, samples: Sequence[Sample]) -> Iterator[Record]:
    for case, values in efficiencies.items():
        low, high = interval(values)
        yield {
            "set": name,
            **case._asdict(),
            "block_efficiency": float(values[0]),
            "low": low,
            "high": high,
            "prompts": len(samples),
            "tokens": sum(sample.runs[case].tokens for sample in samples),
        }


def _ratios(name: str, efficiencies: Efficiencies) -> Iterator[Record]:
    for case, values in efficiencies.items():
        base = efficiencies.get(Case(BASELINE, case.budget))
        if case.method == METHOD and base is not None:
            low, high = interval(values / base)
            yield {
                "set": name,
                "method": METHOD,
                "baseline": BASELINE,
                "budget": case.budget,
                "ratio": float(values[0] / base[0]),
                "low": low,
                "high": high,
            }


def _depth_metrics(samples: Samples) -> list[Record]:
    records: list[Record] = []
    for name, own in samples.items():
        metrics = [each.depth_metrics for each in own if each.depth_metrics is not None]
        if metrics:
            records += [{"set": name, **record} for record in reduce(add, metrics).records()]
    depths = sorted({record["depth"] for record in records})
    return records + [
        _mean_depth([record for record in records if record["depth"] == depth]) for depth in depths
    ]


def _mean_depth(records: Sequence[Record]) -> Record:
    """The mean over the sets that reach a depth."""
    first = records[0]
    means = {
        key: None if value is None else mean(record[key] for record in records)
        for key, value in first.items()
        if key != "set"
    }
    anchors = sum(record["anchors"] for record in records)
    return {"set": MEAN, **means, "depth": first["depth"], "anchors": anchors}


def _rejections(name: str, samples: Sequence[Sample]) -> Iterator[Record]:
    for case in _drafting(samples):
        counts = sum((sample.runs[case].rejections for sample in samples), Counter())
        yield {
            "set": name,
            **case._asdict(),
            **{reason: counts[reason] for reason in REASONS},
        }


def _accepted(name: str, samples: Sequence[Sample]) -> Iterator[Record]:
    for case in _drafting(samples):
        lengths = [n for sample in samples for n in sample.runs[case].accepted_lengths]
        yield {"set": name, **case._asdict(), "iterations": np.bincount(lengths)[1:].tolist()}


def _drafting(samples: Sequence[Sample]) -> Iterable[Case]:
    return (case for case in samples[0].runs if case.method != "ar")
