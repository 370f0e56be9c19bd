"""Who takes part in a comparison, and what came out so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from peer import Peer, PeerError, System

from treeflash.config import Budget

Record = dict[str, Any]
TREES = ("ddtree", "treeflash")


class Case(NamedTuple):
    """A system with one of its methods; budgets are those of treeflash's trees."""

    peer: Peer
    method: str
    budget: Budget | None

    @property
    def name(self) -> Record:
        """As the results give it."""
        system, dtype = self.peer.system, self.peer.about["dtype"]
        return {
            "system": system.name,
            "method": self.method,
            "budget": self.budget,
            "backend": system.backend,
            "dtype": dtype,
        }


class Race:
    """The comparison.

    Attributes:
        cases: that take part.
        records: a prompt decoded by a case each.
        skipped: what cannot run, and why.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.cases: list[Case] = []
        self.records: list[Record] = []
        self.skipped: list[Record] = []

    def enter(
        self, peer: Peer, budgets: Sequence[Budget], methods: Sequence[str] | None = None
    ) -> None:
        """Let a system take part with all its methods, or those of them that are named."""
        for method, reason in peer.about["skipped"].items():
            if methods is None or method in methods:
                self.skip(peer.system, reason, method)
        for method in peer.about["methods"]:
            if methods is not None and method not in methods:
                continue
            trees = peer.system.name == "treeflash" and method in TREES
            self.cases += [Case(peer, method, budget) for budget in (budgets if trees else (None,))]

    def skip(self, system: System, reason: object, method: str | None = None) -> None:
        """Note what cannot run; without a method, that is all of a system."""
        name = {"system": system.name, "backend": system.backend, "method": method}
        self.skipped.append(name | {"reason": str(reason)})

    def warm_up(self, prompt_ids: list[int], max_tokens: int) -> None:
        """Let everybody decode a prompt that does not count."""
        self.run("", "", prompt_ids, max_tokens)
        self.records.clear()

    def run(self, set_name: str, prompt: str | int, prompt_ids: list[int], max_tokens: int) -> None:
        """Let everybody decode a prompt, in turn; who fails takes part no longer."""
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
