"""The cases of a comparison, run in turn, and the records of their runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.peers.system import Peer, PeerError, System
from treeflash.config import Budget

Record = dict[str, Any]
TREES = ("ddtree", "treeflash")


class Case(NamedTuple):
    """A system with one of its methods; only treeflash's tree methods have a budget."""

    peer: Peer
    method: str
    budget: Budget | None

    @property
    def name(self) -> Record:
        """Its columns in the results."""
        system, dtype = self.peer.system, self.peer.about["dtype"]
        return {
            "system": system.name,
            "method": self.method,
            "budget": self.budget,
            "backend": system.backend,
            "dtype": dtype,
        }


class Comparison:
    """Systems that decode the same prompts in turn.

    Attributes:
        cases: those that still run.
        records: one for each prompt and case.
        skipped: systems and methods that cannot run, with the reason.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.cases: list[Case] = []
        self.records: list[Record] = []
        self.skipped: list[Record] = []

    def add(
        self, peer: Peer, budgets: Sequence[Budget], methods: Sequence[str] | None = None
    ) -> None:
        """Add a system with all its methods, or only those named."""
        for method, reason in peer.about["skipped"].items():
            if methods is None or method in methods:
                self.skip(peer.system, reason, method)
        for method in peer.about["methods"]:
            if methods is not None and method not in methods:
                continue
            trees = peer.system.name == "treeflash" and method in TREES
            self.cases += [Case(peer, method, budget) for budget in (budgets if trees else (None,))]

    def skip(self, system: System, reason: object, method: str | None = None) -> None:
        """Record why a method cannot run; without a method, why the system cannot."""
        name = {"system": system.name, "backend": system.backend, "method": method}
        self.skipped.append(name | {"reason": str(reason)})

    def warm_up(self, prompt_ids: list[int], max_tokens: int) -> None:
        """Decode a prompt in every case without keeping the records."""
        self.run("", "", prompt_ids, max_tokens)
        self.records.clear()

    def run(self, set_name: str, prompt: str | int, prompt_ids: list[int], max_tokens: int) -> None:
        """Decode a prompt in every case, in turn; a case that fails is dropped."""
        for case in tuple(self.cases):
            request = {"prompt_ids": prompt_ids, "method": case.method, "budget": case.budget}
            try:
                answer = case.peer.ask(request | {"max_tokens": max_tokens})
            except PeerError as error:
                self.cases.remove(case)
                self.records = [r for r in self.records if not case.name.items() <= r.items()]
                self.skip(case.peer.system, error, case.method)
            else:
                self.records.append(case.name | {"set": set_name, "prompt": prompt} | answer)
