"""One iteration of all running texts: draft, cut, verify, commit. Needs of a kind are one batch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treeflash.config import Method
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.choices import Chosen
from treeflash.decoding.interfaces import Backend, Extension, Verification
from treeflash.decoding.loop import Commit, Cut, Draft, Drafted, Extend, Need, Phase, Verify
from treeflash.decoding.proposals import TreeSize, propose
from treeflash.decoding.running_text import RunningText, Ticket
from treeflash.decoding.tree import DraftTree
from treeflash.errors import TreeflashError, is_out_of_memory


@dataclass(frozen=True, eq=False)
class Iteration:
    """The calls of one iteration.

    Attributes:
        backend: the loaded pair.
        texts: that are running.
        budget: gives a method's adaptive budget.
        prefill_tokens: prompt tokens that are run if trees are verified too, and if none are.
    """

    backend: Backend
    texts: Sequence[RunningText]
    budget: Callable[[Method], AdaptiveBudget]
    prefill_tokens: tuple[int, int]

    def run(self) -> None:
        """Bring every text one iteration further, or the next part of its prompt."""
        self._draft()
        self._cut()
        chunks = self._chunks()
        verifying = self._needing(Verify)
        trees = {text.ticket: text.needed(Verify).tree for text in verifying}
        lengths = {text.ticket: text.state.length for text in verifying}
        extended = self._verify(chunks)
        committed = self._commit()
        if not chunks:  # else the time is not that of these trees alone
            self._observe(committed, trees, lengths)
        for text in committed:
            text.has_drafted |= "draft" in text.seconds
            text.resume(None)
        for text, chosen in extended:
            text.seconds = {"prefill": sum(text.seconds.values())}
            text.resume(chosen)

    def _draft(self) -> None:
        """Draft for the texts that ask for it, unless it does not pay."""
        texts = self._needing(Draft)
        adapting = Counter(text.config.method for text in texts if text.adapts)
        pays = {method: self.budget(method).begin(n) for method, n in adapting.items()}

        def size_of(text: RunningText) -> TreeSize:
            if not text.adapts:
                return TreeSize.fixed(int(text.config.budget))
            budget, n = self.budget(text.config.method), adapting[text.config.method]
            return TreeSize(budget.nodes(n), budget.built(n), budget.depths(n))

        def draft(texts: list[RunningText]) -> list[Drafted]:
            assert self.backend.drafter is not None
            assert self.backend.drafter_config is not None
            roots = [(text.state, text.needed(Draft).root) for text in texts]
            sizes = [size_of(text) for text in texts]
            most = self.backend.drafter_config.depths
            depths = max(min(size.depths or most, most) for size in sizes)
            blocks = self.backend.drafter.draft(roots, depths)
            after_root = np.arange(1, depths + 1, dtype=np.int32)
            positions = [text.state.length + after_root for text in texts]
            configs = [text.config for text in texts]
            tables = propose(self.backend, blocks, configs, sizes, positions)
            return [Drafted(table, size.built) for table, size in zip(tables, sizes, strict=True)]

        drafting = [text for text in texts if pays.get(text.config.method) or not text.adapts]
        for text in texts:
            if text not in drafting:
                text.resume(None)
        for text, drafted in self._batch(drafting, "draft", draft):
            text.resume(drafted, "tree")

    def _cut(self) -> None:
        """Cut the trees of the budget `auto`, those of a method together."""
        rows = sum(len(text.needed(Verify).tree) for text in self._needing(Verify))
        cutting = self._needing(Cut)
        for method in dict.fromkeys(text.config.method for text in cutting):
            texts = [text for text in cutting if text.config.method == method]
            started = time.perf_counter()
            trees = [text.needed(Cut).tree for text in texts]
            kept = self.budget(method).cut(trees, [text.state.length for text in texts], rows)
            rows += sum(map(len, kept))
            for text, nodes in zip(texts, kept, strict=True):
                text.spend("tree", started)
                text.resume(nodes, "tree")

    def _chunks(self) -> dict[Ticket, int]:
        """How many prompt tokens to run, by text: as many as there is room for, in order."""
        room = self.prefill_tokens[0 if self._needing(Verify) else 1]
        chunks = {}
        for text in self._needing(Extend):
            size = min(text.extension, room)
            if size:
                chunks[text.ticket] = size
                room -= size
        return chunks

    def _verify(self, chunks: dict[Ticket, int]) -> list[tuple[RunningText, Chosen]]:
        """Run the target over all trees and chunks; returns the texts whose prompt is complete."""

        def work(text: RunningText) -> Extension | Verification:
            if text.ticket not in chunks:
                return Verification(
                    text.state, text.needed(Verify).tree, text.needed(Verify).choice
                )
            need, end = text.needed(Extend), text.extended + chunks[text.ticket]
            choice = need.choice if end == len(need.token_ids) else None
            return Extension(text.state, need.token_ids[text.extended : end], choice)

        def run(texts: list[RunningText]) -> list[Chosen | None]:
            return self.backend.verifier.run([work(text) for text in texts])

        extending = [text for text in self.texts if text.ticket in chunks]
        extended = []
        for text, chosen in self._batch([*self._needing(Verify), *extending], "verify", run):
            if text.ticket not in chunks:
                text.resume(chosen)
                continue
            text.extended += chunks[text.ticket]
            if text.shared and text.extended == len(text.needed(Extend).token_ids) - 1:
                text.state.snapshot()
            if chosen is not None:
                extended.append((text, chosen))
        return extended

    def _commit(self) -> list[RunningText]:
        """Commit the accepted paths; returns the texts that had one."""

        def commit(texts: list[RunningText]) -> list[None]:
            self.backend.verifier.commit([(x.state, x.needed(Commit).path) for x in texts])
            return [None] * len(texts)

        return [text for text, _ in self._batch(self._needing(Commit), "commit", commit)]

    def _observe(
        self,
        committed: list[RunningText],
        trees: dict[Ticket, DraftTree],
        lengths: dict[Ticket, int],
    ) -> None:
        """Let the adaptive budget of a method learn, if all texts are of that method."""
        methods = {text.config.method for text in committed}
        if len(methods) != 1 or not all(text.adapts for text in committed):
            return
        seconds: dict[Phase, float] = {}
        for text in committed:
            seconds |= text.seconds
        self.budget(methods.pop()).observe(
            [trees[text.ticket] for text in committed],
            [text.needed(Commit).path for text in committed],
            [lengths[text.ticket] for text in committed],
            seconds,
            first=any("draft" in x.seconds and not x.has_drafted for x in committed),
        )

    def _needing(self, kind: type[Need]) -> list[RunningText]:
        return [text for text in self.texts if isinstance(text.need, kind)]

    def _batch(
        self,
        texts: list[RunningText],
        phase: Phase,
        call: Callable[[list[RunningText]], Sequence[Any]],
    ) -> Iterator[tuple[RunningText, Any]]:
        """Call with all texts; if that fails, with each alone, and end those that fail again."""
        if not texts:
            return
        started = time.perf_counter()
        try:
            outcomes = call(texts)
        except Exception as error:
            if not isinstance(error, TreeflashError) and not is_out_of_memory(error):
                raise
            if len(texts) == 1:
                texts[0].fail(error)
            else:
                for text in texts:
                    yield from self._batch([text], phase, call)
            return
        for text in texts:
            text.spend(phase, started)
        yield from zip(texts, outcomes, strict=True)
