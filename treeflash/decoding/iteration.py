"""One iteration of the scheduler: the work of all running sequences, in batched calls.

Every decode loop waits for one piece of `Work` (see `treeflash.decoding.loop`). An iteration
carries out the work of all running sequences, kind by kind, so that work of the same kind from all
sequences runs as one batched call:

1. `Draft`: one call of the drafter, and one of its AR head or marginals for each group of sequences
   with the same options.
2. `Prune`: choose the nodes of trees with the budget `auto`, for all sequences of a method at once.
3. `Verify` and `Prefill`: one forward pass of the target over all trees and over the next chunks of
   prompts, at most `SchedulerConfig.prefill_chunk` tokens of them.
4. `Commit`: keep the accepted paths.

A loop that was answered goes on at once to its next piece of work. So a sequence that drafts goes
through all of the steps in one iteration, and each iteration emits a `Step` for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from treeflash.config import DecodeConfig, Method
from treeflash.decoding.adaptive_budget import AdaptiveBudget, Pause
from treeflash.decoding.batch_trees import draft_trees, observe
from treeflash.decoding.interfaces import (
    Backend,
    Block,
    Pass,
    Prefill,
    SequenceState,
    TableOptions,
    Verify,
    count_captures,
)
from treeflash.decoding.logit_tables import table_options
from treeflash.decoding.loop import Commit, Draft, Drafted, Loop, Phase, Prune, Step, Work
from treeflash.decoding.request import Request
from treeflash.decoding.sampling import Noise, SampledTokens
from treeflash.decoding.suffix import SuffixTree, tree_of
from treeflash.decoding.transitions import Calibration, TransitionTable, check_tokens
from treeflash.decoding.tree import DraftTree
from treeflash.errors import TreeflashError, is_of_earlier_work, is_out_of_memory

W = TypeVar("W", bound=Work)


@dataclass(eq=False)
class RunningSequence:
    """A sequence that has started."""

    request: Request
    state: SequenceState
    loop: Loop
    tokens: list[int]  # the tokens of the prompt, then the emitted ones
    cached: int  # tokens of the prompt that were committed at the start
    snapshot_interval: int  # prompt tokens between two snapshots of recurrent states
    # the work that the loop waits for; None when the sequence is finished
    pending: Work | None = None
    verified: Pass | None = None  # the pass over its tree, until a path is committed
    prefilled: int = 0  # tokens of the pending `Prefill` that are committed already
    has_drafted: bool = False  # whether a tree was drafted for it
    # It pauses drafts of a batch while the trees are cut to the root.
    back_off: Pause = field(default_factory=lambda: Pause(first=2, longest=17))
    shared: bool = False  # whether sequences with the same beginning may fork it
    seconds: dict[Phase, float] = field(default_factory=dict)  # by phase, since the last step
    # steps, and the error that ended the sequence, not handed out yet
    events: list[Step | Exception] = field(default_factory=list)

    @property
    def config(self) -> DecodeConfig:
        return self.request.config

    @property
    def in_prompt(self) -> bool:
        """Whether its prompt is not complete."""
        return len(self.tokens) == len(self.request.prompt_ids)

    @property
    def is_scored(self) -> bool:
        """Whether its prompt is scored, and is not complete."""
        return self.request.scores_prompt and self.in_prompt

    @property
    def chunk_size(self) -> int:
        """Tokens of the pending `Prefill` that may run next: all, or the ones before a snapshot.

        The last token of a prompt always has a chunk of its own where a snapshot is needed, because
        the token before it is where sequences with the same prompt fork. Other prompts may leave a
        long one earlier, so there are snapshots on the way too.
        """
        remaining = len(self.expect(Prefill).token_ids) - self.prefilled
        if remaining == 1 or not (self.shared and self.state.needs_snapshots):
            return remaining
        interval = self.snapshot_interval
        return min(remaining - 1, interval - self.state.length % interval)

    def chunk(self, room: int) -> int:
        """Return how many tokens of the pending `Prefill` to run next, if about `room` fit."""
        size, first = min(self.chunk_size, room), self.state.length
        if not size or (images := self.request.images) is None:
            return size
        return images.chunk_end(first, size) - first

    def expect(self, kind: type[W]) -> W:
        """Return the pending work, which is of that kind."""
        assert isinstance(self.pending, kind)
        return self.pending

    def resume(self, outcome: Any, phase: Phase | None = None) -> None:
        """Send the outcome of the pending work to the loop; None starts it.

        The loop's own time counts as the `phase`; None does not count it.
        """
        started = time.perf_counter()
        self.pending = None
        try:
            item = self.loop.send(outcome)
            while isinstance(item, Step):
                self.events.append(replace(item, seconds=self.seconds))
                self.tokens += item.tokens
                self.seconds = {}
                if item.finish_reason is not None:
                    return
                item = next(self.loop)
            self.pending = item
        except Exception as error:  # its constraint may raise anything: other sequences continue
            self.events.append(error)
        if phase is not None:
            self.add_time(phase, started)

    def fail(self, error: Exception) -> None:
        self.pending = None
        self.events.append(error)

    def add_time(self, phase: Phase, started: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def close(self) -> None:
        """End the loop and give the state's memory back."""
        self.loop.close()
        self.state.close()


def propose(
    backend: Backend,
    blocks: Sequence[Block],
    configs: Sequence[DecodeConfig],
    nodes: Sequence[int],
    positions: Sequence[NDArray[np.int32]] = (),
) -> list[TransitionTable]:
    """Compute the tables of chains or trees, for the blocks of all sequences of one draft.

    `nodes` are the expected sizes of the trees, `positions` the (D,) of each block's depths, which
    greedy sequences do not need.
    """
    # Sequences with the same options are computed together.
    groups: dict[tuple[bool, TableOptions], list[int]] = {}
    for i, (config, size) in enumerate(zip(configs, nodes, strict=True)):
        groups.setdefault((config.uses_head, table_options(config, size)), []).append(i)
    tables: dict[int, TransitionTable] = {}
    for (uses_head, options), members in groups.items():
        if not all(configs[i].sampling.greedy for i in members):
            noise = Noise.from_positions([(configs[i].sampling, positions[i]) for i in members])
            options = replace(options, noise=noise)
        batch = [blocks[i] for i in members]
        if uses_head:
            assert backend.head is not None
            made = backend.head.transitions(batch, options)
            check_tokens(made, backend.vocab_size)
        else:
            assert backend.drafter is not None
            made = backend.drafter.marginals(batch, options)
        tables |= zip(members, made, strict=True)
    return [tables[i] for i in range(len(blocks))]


@dataclass(frozen=True, eq=False)
class Iteration:
    """The calls of one iteration, over all running sequences.

    `budget` gives a method's adaptive budget. `prefill_chunks` are the prompt tokens to run if
    trees are verified too, and if none are.
    """

    backend: Backend
    sequences: Sequence[RunningSequence]
    budget: Callable[[Method], AdaptiveBudget]
    prefill_chunks: tuple[int, int]

    def run(self) -> None:
        """Take every sequence one step forward, or run the next chunk of its prompt."""
        captures = count_captures(self.backend)
        self._draft()
        self._prune()
        chunks = self._chunks()
        verifying = self._pending(Verify)
        trees = {sequence: sequence.expect(Verify).tree for sequence in verifying}
        lengths = {sequence: sequence.state.length for sequence in verifying}
        prefilled = self._verify(chunks)
        committed = self._commit()
        # Otherwise prompts or the capture of a graph took part of the time, or trees were parts of
        # prompts.
        scored = any(sequence.is_scored for sequence in committed)
        if not chunks and not scored and count_captures(self.backend) == captures:
            self._observe(committed, trees, lengths)
        for sequence in committed:
            sequence.has_drafted |= "draft" in sequence.seconds
            sequence.resume(None)
        for sequence, sampled in prefilled:
            sequence.seconds = {"prefill": sum(sequence.seconds.values())}
            sequence.resume(sampled)

    def _draft(self) -> None:
        """Draft for the sequences that ask for it, unless it does not pay."""
        waiting = self._pending(Draft)
        count = len(waiting) + len(self._pending(Verify))  # all of them wait for the pass
        drafting = self._choose_drafting(waiting, count)
        run = partial(self._run_drafter, drafting=drafting, count=count)
        drafts = list(self._batch(list(drafting), "draft", run))
        started = time.perf_counter()
        grown = self._grow(drafts)
        for sequence, _ in drafts:
            sequence.add_time("tree", started)
        for (sequence, drafted), made in zip(drafts, grown, strict=True):
            sequence.resume(replace(drafted, grown=made), "tree")

    def _choose_drafting(
        self, waiting: Sequence[RunningSequence], count: int
    ) -> dict[RunningSequence, SuffixTree | None]:
        """Return the sequences to draft for, with copies of the text if any are wanted.

        The others go on with the copies alone.
        """
        adaptive = dict.fromkeys(x.config.method for x in waiting if x.config.is_adaptive)
        pays = {method: self.budget(method).begin(count) for method in adaptive}
        drafting: dict[RunningSequence, SuffixTree | None] = {}
        for sequence in waiting:
            started = time.perf_counter()
            work, nodes = sequence.expect(Draft), self._nodes_to_copy(sequence.config, count)
            proposal = None
            if nodes and work.suffix is not None:
                proposal = work.suffix.propose(nodes, work.depths)
            drafts = self._runs_drafter(sequence, proposal, pays, count)
            if proposal is not None:
                sequence.add_time("tree", started)
            if drafts:
                drafting[sequence] = proposal
            elif nodes and (proposal is not None or work.constrained):
                sequence.resume(Drafted(None, nodes, proposal), "tree")
            else:
                sequence.resume(None)
        return drafting

    def _nodes_to_copy(self, config: DecodeConfig, count: int) -> int:
        """Return the nodes of a tree of copies; 0 if no copies are wanted."""
        if not config.is_adaptive:
            return int(config.budget)
        budget = self.budget(config.method)
        return budget.nodes_to_copy(count) if budget.copies(count) else 0

    def _runs_drafter(
        self,
        sequence: RunningSequence,
        proposal: SuffixTree | None,
        pays: Mapping[Method, bool],
        count: int,
    ) -> bool:
        """Return whether to draft for a sequence; `pays` says it of each adaptive method."""
        config = sequence.config
        if not config.drafts or not config.is_adaptive:
            return config.drafts
        if not pays[config.method] or not sequence.back_off.begin():
            return False
        if proposal is None:
            return True
        tree = tree_of(proposal, sequence.expect(Draft).root, len(proposal))
        budget = self.budget(config.method)
        return not budget.prefers_copy(tree, sequence.state.length, count)

    def _run_drafter(
        self,
        sequences: Sequence[RunningSequence],
        *,
        drafting: Mapping[RunningSequence, SuffixTree | None],
        count: int,
    ) -> list[Drafted]:
        """Draft for some of the sequences of `drafting`, in one batched call."""
        assert self.backend.drafter is not None
        assert self.backend.drafter_config is not None
        roots = [(sequence.state, sequence.expect(Draft).root) for sequence in sequences]
        configs = [sequence.config for sequence in sequences]
        sizes = [self._tree_sizes(config, drafting, count) for config in configs]
        expected, built, reached = zip(*sizes, strict=True)
        all_depths = self.backend.drafter_config.depths
        depths = max(
            min(likely or all_depths, config.draft_depths or all_depths, all_depths)
            for likely, config in zip(reached, configs, strict=True)
        )
        blocks = self.backend.drafter.draft(roots, depths)
        after_root = np.arange(1, depths + 1, dtype=np.int32)
        positions = [sequence.state.length + after_root for sequence in sequences]
        tables = propose(self.backend, blocks, configs, expected, positions)
        return list(map(Drafted, tables, built, map(drafting.get, sequences)))

    def _tree_sizes(
        self, config: DecodeConfig, drafting: Iterable[RunningSequence], count: int
    ) -> tuple[int, int, int | None]:
        """Return the nodes of the tree that will be verified, and of the tree to build.

        The third number is the depth that the tree is likely to reach; None for any.
        """
        if not config.is_adaptive:
            # The deepest node of n nodes ends a chain, at depth n - 1; the calibration also learns
            # from the depth after it.
            nodes = int(config.budget)
            return nodes, nodes, nodes
        budget = self.budget(config.method)
        sizes = budget.expected_nodes(count), budget.nodes_to_build(count)
        drafter = self.backend.drafter_config
        if drafter is None or drafter.has_marginals:
            return *sizes, budget.depths_to_draft(count)
        lengths = [x.state.length for x in drafting if x.config.method == config.method]
        most = min(config.draft_depths or drafter.depths, drafter.depths)
        return *sizes, budget.passes_to_draft(most, lengths)

    def _grow(
        self, drafts: Sequence[tuple[RunningSequence, Drafted]]
    ) -> list[tuple[TransitionTable, DraftTree] | None]:
        """Make the trees of sequences for all of them at once; None for those whose loops make it.

        Loops do that with copies of the text, and where a table has more depths than a tree needs.
        """
        grown: list[tuple[TransitionTable, DraftTree] | None] = [None] * len(drafts)
        chosen: list[tuple[int, TransitionTable, Calibration, int, int]] = []
        for i, (sequence, drafted) in enumerate(drafts):
            work, table = sequence.expect(Draft), drafted.table
            if work.calibration is None or table is None or drafted.proposal is not None:
                continue
            if table.depths <= min(work.depths, sequence.config.draft_depths or work.depths):
                chosen.append((i, table, work.calibration, work.root, drafted.nodes))
        if chosen:
            numbers, *arguments = zip(*chosen, strict=True)
            for i, made in zip(numbers, draft_trees(*arguments), strict=True):
                grown[i] = made
        return grown

    def _prune(self) -> None:
        """Prune the trees of the budget `auto`, for all sequences of a method at once."""
        pruning = self._pending(Prune)
        nodes_of = {x: len(x.expect(Verify).tree) for x in self._pending(Verify)}
        nodes_of |= dict.fromkeys(pruning, 1)
        for method in dict.fromkeys(sequence.config.method for sequence in pruning):
            sequences = [sequence for sequence in pruning if sequence.config.method == method]
            started = time.perf_counter()
            trees = [sequence.expect(Prune).tree for sequence in sequences]
            lengths = [sequence.state.length for sequence in sequences]
            own = set(sequences)
            others = [(n, x.state.length) for x, n in nodes_of.items() if x not in own]
            kept = self.budget(method).prune(trees, lengths, others)
            for sequence, nodes in zip(sequences, kept, strict=True):
                nodes_of[sequence] = len(nodes)
                sequence.add_time("tree", started)
                if len(sequences) > 1 and "draft" in sequence.seconds:
                    if len(nodes) > 1:
                        sequence.back_off.reset()
                    else:
                        sequence.back_off.extend()
                sequence.resume(nodes, "tree")

    def _chunks(self) -> dict[RunningSequence, int]:
        """Choose how many prompt tokens to run, by sequence: as many as fit, in order."""
        room = self.prefill_chunks[0 if self._pending(Verify) else 1]
        chunks = {}
        for sequence in self._pending(Prefill):
            size = sequence.chunk(room)
            if size:
                chunks[sequence] = size
                room = max(room - size, 0)
        return chunks

    def _verify(
        self, chunks: dict[RunningSequence, int]
    ) -> list[tuple[RunningSequence, SampledTokens]]:
        """Run the target over all trees and chunks; returns sequences whose prompt is complete."""

        def work_of(sequence: RunningSequence) -> Prefill | Verify:
            if sequence not in chunks:
                return sequence.expect(Verify)
            whole, end = sequence.expect(Prefill), sequence.prefilled + chunks[sequence]
            return replace(
                whole,
                token_ids=whole.token_ids[sequence.prefilled : end],
                params=whole.params if end == len(whole.token_ids) else None,
            )

        def run(sequences: list[RunningSequence]) -> list[tuple[Pass, SampledTokens | None]]:
            found = self.backend.verifier.run([work_of(sequence) for sequence in sequences])
            return [(found, sampled) for sampled in found.sampled]

        prefilling = [sequence for sequence in self.sequences if sequence in chunks]
        prefilled = []
        waiting = [*self._pending(Verify), *prefilling]
        for sequence, (found, sampled) in self._batch(waiting, "verify", run):
            if sequence not in chunks:
                sequence.verified = found
                sequence.resume(sampled)
                continue
            sequence.prefilled += chunks[sequence]
            last = len(sequence.expect(Prefill).token_ids) - 1
            on_the_way = sequence.state.length % sequence.snapshot_interval == 0
            if sequence.shared and (sequence.prefilled == last or on_the_way):
                sequence.state.snapshot()
            if sampled is not None:
                prefilled.append((sequence, sampled))
        return prefilled

    def _commit(self) -> list[RunningSequence]:
        """Commit the accepted paths; returns the sequences that had one."""

        def commit(sequences: list[RunningSequence]) -> list[None]:
            verified = sequences[0].verified
            assert verified is not None
            paths = [(x.state, x.expect(Commit).path) for x in sequences]
            self.backend.verifier.commit(verified, paths)
            for sequence in sequences:
                sequence.verified = None
            return [None] * len(sequences)

        # There is one pass, unless it failed and ran for each sequence alone.
        by_pass: dict[Pass | None, list[RunningSequence]] = {}
        for sequence in self._pending(Commit):
            by_pass.setdefault(sequence.verified, []).append(sequence)
        batches = [self._batch(sequences, "commit", commit) for sequences in by_pass.values()]
        committed = [sequence for batch in batches for sequence, _ in batch]
        seen = [sequence.expect(Commit).seen for sequence in committed]
        observe([outcome for outcome in seen if outcome is not None])
        return committed

    def _observe(
        self,
        committed: list[RunningSequence],
        trees: dict[RunningSequence, DraftTree],
        lengths: dict[RunningSequence, int],
    ) -> None:
        """Let the adaptive budget of a method learn, if all sequences are of that method."""
        methods = {sequence.config.method for sequence in committed}
        if len(methods) != 1 or not all(sequence.config.is_adaptive for sequence in committed):
            return
        seconds: dict[Phase, float] = {}
        for sequence in committed:
            seconds |= sequence.seconds
        self.budget(methods.pop()).observe(
            [trees[sequence] for sequence in committed],
            [sequence.expect(Commit).path for sequence in committed],
            [lengths[sequence] for sequence in committed],
            seconds,
            first=any("draft" in x.seconds and not x.has_drafted for x in committed),
        )

    def _pending(self, kind: type[Work]) -> list[RunningSequence]:
        return [sequence for sequence in self.sequences if isinstance(sequence.pending, kind)]

    def _batch(
        self,
        sequences: list[RunningSequence],
        phase: Phase,
        call: Callable[[list[RunningSequence]], Sequence[Any]],
    ) -> Iterator[tuple[RunningSequence, Any]]:
        """Call with all sequences. If that fails, call with each alone; a second error ends it."""
        if not sequences:
            return
        started = time.perf_counter()
        try:
            outcomes = call(sequences)
        except Exception as error:
            if not concerns_few(error):
                raise
            if len(sequences) == 1:
                sequences[0].fail(error)
                return
        else:
            for sequence in sequences:
                sequence.add_time(phase, started)
            yield from zip(sequences, outcomes, strict=True)
            return
        # This is not inside `except`, where the error keeps what the call computed in memory.
        for sequence in sequences:
            yield from self._batch([sequence], phase, call)


def concerns_few(error: Exception) -> bool:
    """Return whether an error of a call may end the sequences of the call, and no others."""
    if is_of_earlier_work(error):
        return False
    return isinstance(error, TreeflashError) or is_out_of_memory(error)
