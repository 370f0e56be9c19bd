"""A comparison: its cases, which decode the same prompts in turn, and the rows of the results."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple, TypeAlias

from benchmarks.common import Row, mean_row, show
from benchmarks.peers.system import BASELINES, Peer, PeerError, System
from treeflash.config import Budget
from treeflash.errors import ConfigError

TREE_METHODS = ("ddtree", "treeflash")
COLUMNS = ("system", "method", "budget", "backend", "dtype", "threads")
FIGURES = (
    *("tokens_per_s", "tokens_per_processor_s", "block_efficiency"),
    *("ratio_to_generate", "ratio_to_llama_cpp"),
)
"""Columns that have means over sets."""
Key: TypeAlias = tuple[object, ...]
"""Some columns of a record."""


class Case(NamedTuple):
    """A system with one of its methods; only treeflash's tree methods have a budget."""

    peer: Peer
    method: str
    budget: Budget | None

    @property
    def columns(self) -> Row:
        """The columns that name the case."""
        system = self.peer.system
        values = (
            system.name,
            self.method,
            self.budget,
            system.backend,
            self.peer.description["dtype"],
            self.peer.threads,
        )
        return dict(zip(COLUMNS, values, strict=True))


class Comparison:
    """Systems that decode the same prompts in turn.

    Attributes:
        cases: the cases that still run.
        records: one for each group of prompts and case: the columns of the case, `set`, `group` (a
            number), `prompts` (how many), and the worker's answer.
        skipped: systems and methods that cannot run, with the reason.
    """

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self.records: list[Row] = []
        self.skipped: list[Row] = []

    def add(
        self, peer: Peer, budgets: Sequence[Budget], methods: Sequence[str] | None = None
    ) -> None:
        """Add a system with all its methods, or only with the named ones."""
        for method, reason in peer.description["skipped"].items():
            if methods is None or method in methods:
                self.skip(peer.system, reason, method)
        for method in peer.description["methods"]:
            if methods is None or method in methods:
                has_budget = peer.system.name.startswith("treeflash") and method in TREE_METHODS
                sizes = budgets if has_budget else (None,)
                self.cases += [Case(peer, method, budget) for budget in sizes]

    def skip(self, system: System, reason: object, method: str | None = None) -> None:
        """Record why a method cannot run; without a method, why the system cannot."""
        row = {"system": system.name, "backend": system.backend, "method": method}
        self.skipped.append(row | {"reason": str(reason)})

    def run(
        self, prompts: Sequence[list[int]], max_tokens: int, *, keep: Row | None = None
    ) -> None:
        """Decode a group of prompts in every case, in turn; a case that fails is dropped.

        Args:
            prompts: token ids of prompts that are handed over at once.
            max_tokens: new tokens of each.
            keep: the columns `set` and `group` of the records; None keeps none, to warm up.
        """
        for case in tuple(self.cases):
            request = {"prompts": prompts, "method": case.method, "budget": case.budget}
            try:
                answer = case.peer.ask(request | {"max_tokens": max_tokens})
            except PeerError as error:
                self.cases.remove(case)
                self.records = [r for r in self.records if not case.columns.items() <= r.items()]
                self.skip(case.peer.system, error, case.method)
            else:
                if keep is not None:
                    self.records.append(case.columns | keep | {"prompts": len(prompts)} | answer)

    def check(self) -> None:
        """Print what was skipped; a ConfigError if nothing was measured."""
        if self.skipped:
            show("skipped", self.skipped)
        if not self.records:
            raise ConfigError("nothing was measured; see the reasons above, or --methods")

    def rows(self) -> list[Row]:
        """Return one row for each case and set of single prompts, and one for a case's mean.

        Ratios are medians over prompts; `equal` counts the prompts with the same tokens as the
        baseline. A sequence that ends with its first token has no speed and is left out.
        """
        groups: dict[tuple[Key, str], list[Row]] = {}
        baselines: dict[Key, Row] = {}
        llama_cpp: dict[Key, Row] = {}
        for record in self.records:
            if not _tokens(record):
                continue
            case = tuple(record[key] for key in COLUMNS)
            groups.setdefault((case, record["set"]), []).append(record)
            if (record["system"], record["method"]) == (BASELINES[record["backend"]], "generate"):
                baselines[_prompt_key(record)] = record
                if record["backend"] == "gguf":
                    llama_cpp[_prompt_key(record)[1:]] = record
        rows = [_set_row(group, baselines, llama_cpp) for group in groups.values()]
        cases = dict.fromkeys(case for case, _ in groups)
        columns = [dict(zip(COLUMNS, case, strict=True)) for case in cases]
        return rows + [mean_row(rows, case, FIGURES) for case in columns]


def _prompt_key(record: Row) -> Key:
    return record["backend"], record["set"], record["group"], record["threads"]


def _set_row(records: Sequence[Row], baselines: dict[Key, Row], llama_cpp: dict[Key, Row]) -> Row:
    pairs = [(r, baselines[_prompt_key(r)]) for r in records if _prompt_key(r) in baselines]
    others = [
        (r, llama_cpp[_prompt_key(r)[1:]]) for r in records if _prompt_key(r)[1:] in llama_cpp
    ]
    tokens = sum(map(_tokens, records))
    return {key: records[0][key] for key in ("set", *COLUMNS)} | {
        "tokens_per_s": tokens / sum(map(_seconds, records)),
        "tokens_per_processor_s": tokens / sum(record["processor_seconds"] for record in records),
        "block_efficiency": tokens / sum(record["forwards"] for record in records),
        "ratio_to_generate": _median_ratio(pairs),
        "ratio_to_llama_cpp": _median_ratio(others),
        "equal": sum(record["token_ids"] == base["token_ids"] for record, base in pairs),
        "prompts": len(records),
    }


def _median_ratio(pairs: Sequence[tuple[Row, Row]]) -> float | None:
    ratios = [_speed(record) / _speed(baseline) for record, baseline in pairs]
    return median(ratios) if ratios else None


def _tokens(record: Row) -> int:
    return len(record["token_ids"][0]) - 1  # without the prefill's


def _seconds(record: Row) -> float:
    return float(record["seconds"] - record["first"][0])


def _speed(record: Row) -> float:
    return _tokens(record) / _seconds(record)
