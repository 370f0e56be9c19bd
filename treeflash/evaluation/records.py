"""The results of an evaluation as records, with bootstrap confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import Method
from treeflash.evaluation.run import REASONS, BestDraft, Case, Sample
from treeflash.text.generation import mean
from treeflash.text.prompt import Row

RESAMPLES = 1000
LEVEL = 0.95
Record: TypeAlias = dict[str, Any]
Samples: TypeAlias = Mapping[str, Sequence[Sample]]
Efficiencies: TypeAlias = Mapping[Case, NDArray[np.float64]]

MEAN = "mean"
"""The name of the mean over sets, which have equal weights."""
COMPARED: tuple[tuple[Method, Method], ...] = (
    ("treeflash", "ddtree"),
    ("treeflash", "treeflash-chain"),
    ("ddtree", "dflash"),
)
"""Methods and their baselines, with the same budget; a chain ends with its block."""


def compute_records(samples: Samples, seed: int) -> dict[str, list[Record]]:
    """Aggregate finished samples by set, all of which have the same cases.

    Intervals are 95 % bootstrap intervals over prompts; all cases share the resampled prompts.

    Returns:
        - `rows`, by set and case: tokens per target forward pass after the prefill;
        - `ratios`, by set and budget: block efficiencies of `COMPARED` methods over each other;
        - `depths`, by set and depth: the means of `treeflash.evaluation.run.METRICS`;
        - `lost`, by set and drafting case: iterations by rejection reason;
        - `branches`, by drafting case and depth, over all sets: how often the best draft was right,
          on the spine and after an accepted sibling (`BestDraft`);
        - `accepted`, by set and drafting case: iterations by accepted length, 1, 2, ...
    """
    rng = np.random.default_rng(seed)
    efficiencies = {
        name: efficiencies_by_case(prompts, resamples(len(prompts), rng))
        for name, prompts in samples.items()
    }
    efficiencies[MEAN] = {
        case: np.mean([by_case[case] for by_case in efficiencies.values()], 0)
        for case in next(iter(efficiencies.values()))
    }
    all_samples = [sample for prompts in samples.values() for sample in prompts]
    return {
        "rows": [
            row
            for name, by_case in efficiencies.items()
            for row in _rows(name, by_case, samples.get(name, all_samples))
        ],
        "ratios": [row for name, by_case in efficiencies.items() for row in _ratios(name, by_case)],
        "depths": _depth_metrics(samples),
        "lost": [row for name, prompts in samples.items() for row in _rejections(name, prompts)],
        "branches": list(_branches(all_samples)),
        "accepted": [row for name, prompts in samples.items() for row in _accepted(name, prompts)],
    }


def prompt_records(
    finished: Mapping[str, Mapping[int, Sample]], rows: Mapping[str, Sequence[Row]]
) -> list[Record]:
    """Return what each finished prompt took, with the id of its row.

    Its new `tokens` are one token from the prefill, and the tokens that `iterations` committed.
    """
    return [
        {
            "set": name,
            "id": rows[name][number].id,
            **case._asdict(),
            "tokens": run.tokens,
            "iterations": len(run.accepted_lengths),
        }
        for name, samples in finished.items()
        for number, sample in sorted(samples.items())
        for case, run in sample.runs.items()
    ]


def efficiencies_by_case(samples: Sequence[Sample], indices: NDArray[np.int64]) -> Efficiencies:
    return {
        case: block_efficiencies([own.runs[case].accepted_lengths for own in samples], indices)
        for case in samples[0].runs
    }


def block_efficiencies(
    lengths: Sequence[Sequence[int]], indices: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Pool n prompts' accepted lengths as (r, n) indices choose: (r,) block efficiencies."""
    return ratios_of_sums([(sum(prompt), len(prompt)) for prompt in lengths], indices)


def ratios_of_sums(
    pairs: Sequence[tuple[float, float]], indices: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Sum the numbers of n pairs as (r, n) indices choose: (r,) first sums over the second."""
    first, second = np.array(pairs)[indices].sum(1).T
    ratios: NDArray[np.float64] = first / second
    return ratios


def _rows(name: str, efficiencies: Efficiencies, samples: Sequence[Sample]) -> Iterator[Record]:
    for case, values in efficiencies.items():
        yield {
            "set": name,
            **case._asdict(),
            "block_efficiency": float(values[0]),
            **dict(zip(("low", "high"), interval(values), strict=True)),
            "prompts": len(samples),
            "tokens": sum(sample.runs[case].tokens for sample in samples),
        }


def _ratios(name: str, efficiencies: Efficiencies) -> Iterator[Record]:
    for method, baseline in COMPARED:
        for case, values in efficiencies.items():
            base = efficiencies.get(Case(baseline, case.budget))
            if case.method == method and base is not None:
                yield {
                    "set": name,
                    "method": method,
                    "baseline": baseline,
                    "budget": case.budget,
                    "ratio": float(values[0] / base[0]),
                    **dict(zip(("low", "high"), interval(values / base), strict=True)),
                }


def _depth_metrics(samples: Samples) -> list[Record]:
    records: list[Record] = []
    for name, prompts in samples.items():
        metrics = [prompt.depth_metrics for prompt in prompts if prompt.depth_metrics is not None]
        if metrics:
            records += [{"set": name, **record} for record in reduce(add, metrics).records()]
    depths = sorted({record["depth"] for record in records})
    return records + [
        _mean_depth([record for record in records if record["depth"] == depth]) for depth in depths
    ]


def _mean_depth(records: Sequence[Record]) -> Record:
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
        if case.method == "suffix":  # its copies are from no table, which has the reasons
            continue
        counts = sum((sample.runs[case].rejections for sample in samples), Counter())
        yield {"set": name, **case._asdict(), **{reason: counts[reason] for reason in REASONS}}


def _accepted(name: str, samples: Sequence[Sample]) -> Iterator[Record]:
    for case in _drafting(samples):
        lengths = [n for sample in samples for n in sample.runs[case].accepted_lengths]
        yield {"set": name, **case._asdict(), "iterations": np.bincount(lengths)[1:].tolist()}


def _branches(samples: Sequence[Sample]) -> Iterator[Record]:
    for case in _drafting(samples):
        counts = sum((sample.runs[case].best_drafts for sample in samples), Counter())
        for depth in sorted({draft.depth for draft in counts}):
            record: Record = {**case._asdict(), "depth": depth}
            for name, on_spine in (("spine", True), ("sibling", False)):
                right, wrong = (counts[BestDraft(depth, on_spine, x)] for x in (True, False))
                drafts = right + wrong
                record |= {name: right / drafts if drafts else None, f"{name}_drafts": drafts}
            yield record


def _drafting(samples: Sequence[Sample]) -> Iterable[Case]:
    return (case for case in samples[0].runs if case.method != "ar")


def resamples(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw indices of n prompts, (1 + RESAMPLES, n): all prompts once, then with replacement."""
    return np.concatenate([np.arange(n)[None], rng.integers(0, n, (RESAMPLES, n))])


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Compute the percentile interval (low, high), of level `LEVEL`, of (1 + RESAMPLES,) values."""
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def with_interval(values: NDArray[np.float64]) -> str:
    """Format the first of (1 + RESAMPLES,) statistics, with the interval in brackets."""
    low, high = interval(values)
    return f"{values[0]:.2f} ({low:.2f} to {high:.2f})"
