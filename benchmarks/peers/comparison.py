"""A comparison: its cases, which decode the same prompts in turn, and the rows of the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import eq
from statistics import median
from typing import Any, NamedTuple

from benchmarks.common import Row, mean_row, show
from benchmarks.peers.system import BASELINES, Peer, PeerError, System
from treeflash.config import Budget
from treeflash.errors import ConfigError

TREE_METHODS = ("ddtree", "treeflash")
CASE = ("system", "method", "budget", "backend", "dtype", "threads")
"""Columns that name a case."""
COLUMNS = ("set", "concurrency", *CASE)
"""Columns that name a row."""
GROUP = ("set", "group", "concurrency", "threads")
RATIOS: dict[str, tuple[Callable[[Row], bool], Sequence[str]]] = {
    "generate": (lambda x: is_of(x, BASELINES.get(x["backend"]), "generate"), (*GROUP, "backend")),
    "llama_cpp": (lambda x: is_of(x, "llama.cpp", "generate"), GROUP),
    "ar": (lambda x: is_of(x, "treeflash", "ar"), (*GROUP, "backend")),
}
"""Whether speeds are compared with a record's, and columns that have equal values in both."""
FIGURES = (
    *("tokens_per_s", "tokens_per_processor_s", "block_efficiency", "first_token_s"),
    *(f"ratio_to_{name}" for name in RATIOS),
    "ratio_to_one",
)
"""Columns that have means over sets."""


class Case(NamedTuple):
    """A system with one of its methods; only treeflash's tree methods have a budget."""

    peer: Peer
    method: str
    budget: Budget | None

    @property
    def columns(self) -> Row:
        """The columns that name the case."""
        peer, system = self.peer, self.peer.system
        values = system.name, self.method, self.budget, system.backend, peer.description["dtype"]
        return dict(zip(CASE, (*values, peer.threads), strict=True))


class Comparison:
    """Systems that decode the same groups of prompts in turn.

    Args:
        whole: whether times and tokens include the prefill; several prompts at once need that.

    Attributes:
        cases: the cases that still run.
        records: one for each group of prompts and case: the columns of the case, `set`, `group` (a
            number), `concurrency` (prompts of the group), and the worker's answer.
        skipped: systems and methods that cannot run, with the reason.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self.whole = whole
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
                has_budget = peer.system.name == "treeflash" and method in TREE_METHODS
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
                    row = case.columns | keep | {"concurrency": len(prompts)}
                    self.records.append(row | answer)

    def check(self) -> None:
        """Print what was skipped; a ConfigError if nothing was measured."""
        if self.skipped:
            show("skipped", self.skipped)
        if not self.records:
            raise ConfigError("nothing was measured; see the reasons above, or --methods")

    def rows(self) -> list[Row]:
        """Return one row for each case, concurrency and set, and one for its mean over sets.

        Ratios of speeds are medians over groups; `ratio_to_one`, to one prompt at a time, is of the
        whole set. `equal` counts the texts of the framework's `generate`, or else of treeflash's
        plain decoding. A group whose texts end with their first tokens has no speed and is left
        out.
        """
        records = [record for record in self.records if new_tokens(record)]
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for record in records:
            groups.setdefault(values(record, COLUMNS), []).append(record)
        bases = {
            name: {values(record, columns): record for record in records if is_base(record)}
            for name, (is_base, columns) in RATIOS.items()
        }
        rows = [self._row(group, bases) for group in groups.values()]
        speeds = {values(row, COLUMNS): row["tokens_per_s"] for row in rows}
        for row in rows:
            one = speeds.get(values(row | {"concurrency": 1}, COLUMNS))
            row["ratio_to_one"] = one and row["tokens_per_s"] / one
        cases = dict.fromkeys(values(row, COLUMNS[1:]) for row in rows)
        columns = [dict(zip(COLUMNS[1:], case, strict=True)) for case in cases]
        return rows + [mean_row(rows, case, FIGURES) for case in columns]

    def _row(self, group: Sequence[Row], bases: dict[str, dict[tuple[Any, ...], Row]]) -> Row:
        tokens = sum(map(new_tokens, group))
        texts = [ids for record in group for ids in record["token_ids"]]
        pairs = {
            name: [
                (x, bases[name][key]) for x in group if (key := values(x, columns)) in bases[name]
            ]
            for name, (_, columns) in RATIOS.items()
        }
        ratios = {
            f"ratio_to_{name}": median(self._speed([x]) / self._speed([y]) for x, y in found)
            if found
            else None
            for name, found in pairs.items()
        }
        is_alone = group[0]["concurrency"] == 1
        processor_s, forwards = (
            sum(x[name] for x in group) for name in ("processor_seconds", "forwards")
        )
        return {
            **{name: group[0][name] for name in COLUMNS},
            "tokens_per_s": self._speed(group),
            "tokens_per_processor_s": tokens / processor_s if is_alone else None,
            "block_efficiency": tokens / forwards if is_alone else None,
            "first_token_s": median(first for x in group for first in x["first"]),
            **ratios,
            "equal": sum(
                sum(map(eq, x["token_ids"], y["token_ids"]))
                for x, y in pairs["generate"] or pairs["ar"]
            ),
            "prompts": len(texts),
        }

    def _speed(self, records: Sequence[Row]) -> float:
        """Return tokens per second, as `whole` says."""
        if not self.whole:
            return sum(map(new_tokens, records)) / sum(map(decode_seconds, records))
        tokens = sum(len(ids) for record in records for ids in record["token_ids"])
        return tokens / sum(record["seconds"] for record in records)


def values(record: Row, columns: Sequence[str]) -> tuple[Any, ...]:
    """Return the values of some columns."""
    return tuple(record[name] for name in columns)


def is_of(record: Row, system: str | None, method: str) -> bool:
    """Return whether a record is of a system with a method."""
    return (record["system"], record["method"]) == (system, method)


def new_tokens(answer: Row) -> int:
    """Return the tokens of an answer after the first of each text, which is the prefill's."""
    return sum(len(ids) - 1 for ids in answer["token_ids"])


def decode_seconds(answer: Row) -> float:
    """Return the seconds from the first token to the last one of a prompt's answer."""
    return float(answer["seconds"] - answer["first"][0])
