"""Continuous batching: the scheduler runs the decode loops of many sequences on one loaded pair.

Every loop waits for one piece of `Work` (see `treeflash.decoding.loop`). One iteration of the
scheduler carries out the work of all running sequences, kind by kind, so that work of the same kind
from all sequences runs as one batched call:

1. Admit waiting requests, in order, while there is room.
2. `Draft`: one call of the drafter, and one of its AR head or marginals for each group of sequences
   with the same options.
3. `Prune`: choose the nodes of trees with the budget `auto`, for all sequences of a method at once.
4. `Verify` and `Prefill`: one forward pass of the target over all trees and over the next chunks of
   prompts, at most `SchedulerConfig.prefill_chunk` tokens of them.
5. `Commit`: keep the accepted paths.

A loop that was answered goes on at once to its next piece of work. So a sequence that drafts goes
through all of the steps in one iteration, and each iteration emits a `Step` for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NewType, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from treeflash.config import AUTO, DecodeConfig, Method
from treeflash.decoding.adaptive_budget import AdaptiveBudget, AdaptiveBudgets
from treeflash.decoding.batch_trees import draft_trees, observe
from treeflash.decoding.disk_cache import CacheKey, Restoration
from treeflash.decoding.interfaces import (
    Backend,
    Block,
    Prefill,
    SequenceState,
    TableOptions,
    Verify,
)
from treeflash.decoding.loop import (
    SCORED_TOKENS,
    Commit,
    Draft,
    Drafted,
    Loop,
    Phase,
    Prune,
    Step,
    Work,
    decode_loop,
)
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.sampling import Constraint, Noise, SampledTokens
from treeflash.decoding.suffix import SuffixCache, SuffixIndex, SuffixTree, tree_of
from treeflash.decoding.transitions import Calibration, TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.drafters.mtp_heads import NO_MARGINALS
from treeflash.errors import (
    ConfigError,
    ContextLengthError,
    MemoryInUseError,
    PromptError,
    TreeflashError,
    is_out_of_memory,
)

MIB = 1 << 20
SNAPSHOT_INTERVAL = 2048
"""Prompt tokens between two snapshots of recurrent states."""
RequestId = NewType("RequestId", int)
"""Names a request of one scheduler."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A sequence to decode.

    Attributes:
        prompt_ids: at least one token.
        config: method, budget, limits, sampling.
        constraint: of the generated tokens; belongs to this request alone.
        scores_prompt: whether the first step has the log probabilities of the prompt. Then nothing
            of it comes from a prefix cache.
        cache_salt: only sequences with the same salt share the states of a prefix cache.
    """

    prompt_ids: Sequence[int]
    config: DecodeConfig
    constraint: Constraint | None = None
    scores_prompt: bool = False
    cache_salt: str = ""


Event: TypeAlias = tuple[RequestId, Step | Exception]
"""A step of a sequence, or the error that ended it."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of a scheduler.

    Attributes:
        max_parallel: sequences that run at once; further requests wait in order.
        max_bytes: device memory for the states of sequences; None does not limit it.
        prefill_chunk: prompt tokens that run in one iteration while other sequences are decoded,
            which bounds how long these wait.
        lone_prefill_chunk: prompt tokens that run in one iteration while no sequence is decoded.
    """

    max_parallel: int = 32
    max_bytes: int | None = None
    prefill_chunk: int = 256
    lone_prefill_chunk: int = 2048


def check(backend: Backend, request: Request) -> None:
    """Raise the error that decoding this request would meet, if any."""
    prompt_ids, config = request.prompt_ids, request.config
    drafter = backend.drafter_config
    if config.drafts and drafter is None:
        raise ConfigError(
            f"method {config.method} needs a drafter and none was loaded; load a drafter "
            "(--drafter), or use method suffix or ar"
        )
    if config.method == "suffix":
        backend.check_trees()
    if config.uses_head and backend.head is None:
        raise ConfigError(
            f"method {config.method} needs an AR head, and the loaded drafter has no AR head; "
            "use method ddtree or dflash"
        )
    if drafter and config.drafts and not config.uses_head and not drafter.has_marginals:
        raise ConfigError(NO_MARGINALS)
    if not len(prompt_ids):
        raise PromptError("the prompt is empty; give at least one token")
    if len(prompt_ids) >= backend.max_positions:
        raise ContextLengthError(len(prompt_ids), backend.max_positions)
    for token, _ in config.penalties.logit_bias:
        if token >= backend.vocab_size:
            raise ConfigError(
                f"logit_bias has the token id {token}, and the target's vocabulary has "
                f"{backend.vocab_size} tokens"
            )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < backend.vocab_size:
        raise PromptError(
            f"the prompt has token ids outside the target's vocabulary of {backend.vocab_size}; "
            "was it encoded with another model's tokenizer?"
        )


def best_method(backend: Backend, *, copies: bool) -> Method:
    """Return the best method of a pair; `copies` is whether one without a drafter copies text."""
    if backend.drafter_config is None:
        return "suffix" if copies else "ar"
    return "ddtree" if backend.head is None else "treeflash"


W = TypeVar("W", bound=Work)


@dataclass(eq=False)
class RunningSequence:
    """A sequence that has started."""

    request_id: RequestId
    request: Request
    state: SequenceState
    loop: Loop
    tokens: list[int]  # the tokens of the prompt, then the emitted ones
    # the work that the loop waits for; None when the sequence is finished
    pending: Work | None = None
    prefilled: int = 0  # tokens of the pending `Prefill` that are committed already
    has_drafted: bool = False  # whether a tree was drafted for it
    skip_drafts: int = 0  # drafts of a batch to skip, because its trees were cut to the root
    next_skip: int = 1  # drafts to skip after the next such tree
    shared: bool = False  # whether sequences that begin alike may fork its state
    seconds: dict[Phase, float] = field(default_factory=dict)  # by phase, since the last step
    # steps, and the error that ended the sequence, not handed out yet
    events: list[Step | Exception] = field(default_factory=list)

    @property
    def config(self) -> DecodeConfig:
        return self.request.config

    @property
    def is_scored(self) -> bool:
        """Whether its prompt is scored, and is not complete."""
        return self.request.scores_prompt and len(self.tokens) == len(self.request.prompt_ids)

    @property
    def chunk_size(self) -> int:
        """Tokens of the pending `Prefill` that may run next: all, or those before a snapshot.

        The last token of a prompt always has a chunk of its own where a snapshot is needed, because
        the token before it is where sequences with the same prompt fork. Other prompts may leave a
        long one earlier, so there are snapshots on the way too.
        """
        remaining = len(self.expect(Prefill).token_ids) - self.prefilled
        if remaining == 1 or not (self.shared and self.state.needs_snapshots):
            return remaining
        return min(remaining - 1, SNAPSHOT_INTERVAL - self.state.length % SNAPSHOT_INTERVAL)

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
        except Exception as error:  # from its constraint, for example: other sequences continue
            self.events.append(error)
        if phase is not None:
            self.add_time(phase, started)

    def update_backoff(self, kept_nodes: int) -> None:
        """Skip exponentially more drafts while pruning keeps only the root."""
        if kept_nodes > 1:
            self.next_skip = 1
        else:
            self.skip_drafts, self.next_skip = self.next_skip, min(2 * self.next_skip, MAX_SKIP)

    def fail(self, error: Exception) -> None:
        self.pending = None
        self.events.append(error)

    def add_time(self, phase: Phase, started: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def close(self) -> None:
        """End the loop and give the state's memory back."""
        self.loop.close()
        self.state.close()


MAX_SKIP = 16
"""The most drafts of a batch that a sequence skips before it is drafted for again."""
ROWS_PER_NODE, MIN_ROWS = 4, 16
"""Rows of the AR head for a tree: on average the block efficiency stays within 1.5 % of that with
all rows for 8 nodes, and within 1 % for more (docs/history.md)."""
TOKENS_PER_NODE, MIN_TOKENS = 32, 256
"""Tokens that the AR head scores for a tree, if no fewer are asked for; 256 change the block
efficiency of 8 nodes by 0.1 %."""


def table_options(config: DecodeConfig, nodes: int) -> TableOptions:
    """Return the options of the table for a tree or chain of `nodes` nodes, without noise."""
    k, temperature = config.top_k_children, config.draft_temperature
    if not config.uses_head:
        return TableOptions(k=1 if config.drafts_chain else k, temperature=temperature)
    rows, shortlist = config.head_rows, config.head_vocab
    if rows == AUTO:
        # The token that a chain continues from may be improbable by its marginal.
        rows = None if config.drafts_chain else max(ROWS_PER_NODE * nodes, MIN_ROWS)
    if shortlist is not None:
        shortlist = min(shortlist, max(TOKENS_PER_NODE * nodes, MIN_TOKENS))
    return TableOptions(
        k=k, m=config.top_m, temperature=temperature, shortlist=shortlist, rows=rows
    )


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
        else:
            assert backend.drafter is not None
            made = backend.drafter.marginals(batch, options)
        tables |= zip(members, made, strict=True)
    return [tables[i] for i in range(len(blocks))]


@dataclass(frozen=True)
class TreeSize:
    """How much of a draft a tree can use."""

    expected: int  # nodes of the tree that is verified
    built: int  # nodes of the tree that is built, and perhaps pruned
    depths: int | None  # depths that the tree is likely to reach; None for all


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
        """Bring every sequence one step further, or run the next chunk of its prompt."""
        captures = self._captures()
        self._draft()
        self._prune()
        chunks = self._chunks()
        verifying = self._pending(Verify)
        trees = {sequence.request_id: sequence.expect(Verify).tree for sequence in verifying}
        lengths = {sequence.request_id: sequence.state.length for sequence in verifying}
        prefilled = self._verify(chunks)
        committed = self._commit()
        # Otherwise prompts or the capture of a graph took part of the time, or trees were parts of
        # prompts.
        scored = any(sequence.is_scored for sequence in committed)
        if not chunks and not scored and self._captures() == captures:
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
        adaptive = Counter(x.config.method for x in waiting if x.config.is_adaptive)
        pays = {method: self.budget(method).begin(count) for method, count in adaptive.items()}
        drafting = []
        proposals: dict[RequestId, SuffixTree] = {}

        def copy(sequence: RunningSequence) -> SuffixTree | None:
            """Copy what followed earlier occurrences of the text, unless copying does not pay."""
            config, work = sequence.config, sequence.expect(Draft)
            if work.suffix is None:
                return None
            if not config.is_adaptive:
                return work.suffix.propose(int(config.budget), work.depths)
            budget, count = self.budget(config.method), adaptive[config.method]
            if not pays[config.method] and not budget.copies_alone(count):
                return None
            nodes = budget.nodes_to_copy(count)
            return work.suffix.propose(nodes, work.depths)

        def runs_drafter(sequence: RunningSequence, proposal: SuffixTree | None) -> bool:
            config = sequence.config
            if not config.drafts or not config.is_adaptive:
                return config.drafts
            if not pays[config.method]:
                return False
            if sequence.skip_drafts:
                sequence.skip_drafts -= 1
                return False
            if proposal is None:
                return True
            tree = tree_of(proposal, sequence.expect(Draft).root, len(proposal))
            budget, count = self.budget(config.method), adaptive[config.method]
            return not budget.prefers_copy(tree, sequence.state.length, count)

        for sequence in waiting:
            started = time.perf_counter()
            proposal = copy(sequence)
            runs = runs_drafter(sequence, proposal)
            if proposal is not None:
                sequence.add_time("tree", started)
                proposals[sequence.request_id] = proposal
            if runs:
                drafting.append(sequence)
            elif proposal is None:
                sequence.resume(None)
            else:
                sequence.resume(Drafted(None, len(proposal), proposal), "tree")

        def size_of(config: DecodeConfig) -> TreeSize:
            if config.is_adaptive:
                budget, count = self.budget(config.method), adaptive[config.method]
                sizes = budget.expected_nodes(count), budget.nodes_to_build(count)
                drafter = self.backend.drafter_config
                if drafter is not None and not drafter.has_marginals:
                    lengths = [x.state.length for x in drafting if x.config.method == config.method]
                    most = min(config.draft_depths or drafter.depths, drafter.depths)
                    return TreeSize(*sizes, budget.passes_to_draft(most, lengths))
                return TreeSize(*sizes, budget.depths_to_draft(count))
            # The deepest node of n nodes ends a chain, at depth n - 1; the calibration also learns
            # from the depth after it.
            nodes = int(config.budget)
            return TreeSize(nodes, nodes, nodes)

        def draft(sequences: list[RunningSequence]) -> list[Drafted]:
            assert self.backend.drafter is not None
            assert self.backend.drafter_config is not None
            roots = [(sequence.state, sequence.expect(Draft).root) for sequence in sequences]
            configs = [sequence.config for sequence in sequences]
            sizes = [size_of(config) for config in configs]
            all_depths = self.backend.drafter_config.depths
            depths = max(
                min(size.depths or all_depths, config.draft_depths or all_depths, all_depths)
                for size, config in zip(sizes, configs, strict=True)
            )
            blocks = self.backend.drafter.draft(roots, depths)
            after_root = np.arange(1, depths + 1, dtype=np.int32)
            positions = [sequence.state.length + after_root for sequence in sequences]
            nodes = [size.expected for size in sizes]
            tables = propose(self.backend, blocks, configs, nodes, positions)
            copies = [proposals.get(sequence.request_id) for sequence in sequences]
            return [
                Drafted(table, size.built, proposal)
                for table, size, proposal in zip(tables, sizes, copies, strict=True)
            ]

        drafts = list(self._batch(drafting, "draft", draft))
        started = time.perf_counter()
        grown = self._grow(drafts)
        for sequence, _ in drafts:
            sequence.add_time("tree", started)
        for (sequence, drafted), made in zip(drafts, grown, strict=True):
            parts = drafted.table, drafted.nodes, drafted.proposal, made
            sequence.resume(Drafted(*parts), "tree")

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
        rows = sum(len(sequence.expect(Verify).tree) for sequence in self._pending(Verify))
        pruning = self._pending(Prune)
        for method in dict.fromkeys(sequence.config.method for sequence in pruning):
            sequences = [sequence for sequence in pruning if sequence.config.method == method]
            started = time.perf_counter()
            trees = [sequence.expect(Prune).tree for sequence in sequences]
            lengths = [sequence.state.length for sequence in sequences]
            kept = self.budget(method).prune(trees, lengths, rows)
            rows += sum(map(len, kept))
            for sequence, nodes in zip(sequences, kept, strict=True):
                sequence.add_time("tree", started)
                if len(sequences) > 1 and "draft" in sequence.seconds:
                    sequence.update_backoff(len(nodes))
                sequence.resume(nodes, "tree")

    def _chunks(self) -> dict[RequestId, int]:
        """Choose how many prompt tokens to run, by sequence: as many as fit, in order."""
        room = self.prefill_chunks[0 if self._pending(Verify) else 1]
        chunks = {}
        for sequence in self._pending(Prefill):
            size = min(sequence.chunk_size, room)
            if size:
                chunks[sequence.request_id] = size
                room -= size
        return chunks

    def _verify(self, chunks: dict[RequestId, int]) -> list[tuple[RunningSequence, SampledTokens]]:
        """Run the target over all trees and chunks; returns sequences whose prompt is complete."""

        def work_of(sequence: RunningSequence) -> Prefill | Verify:
            if sequence.request_id not in chunks:
                return sequence.expect(Verify)
            whole, end = sequence.expect(Prefill), sequence.prefilled + chunks[sequence.request_id]
            return replace(
                whole,
                token_ids=whole.token_ids[sequence.prefilled : end],
                params=whole.params if end == len(whole.token_ids) else None,
            )

        def run(sequences: list[RunningSequence]) -> list[SampledTokens | None]:
            return self.backend.verifier.run([work_of(sequence) for sequence in sequences])

        prefilling = [sequence for sequence in self.sequences if sequence.request_id in chunks]
        prefilled = []
        for sequence, sampled in self._batch([*self._pending(Verify), *prefilling], "verify", run):
            if sequence.request_id not in chunks:
                sequence.resume(sampled)
                continue
            sequence.prefilled += chunks[sequence.request_id]
            last = len(sequence.expect(Prefill).token_ids) - 1
            on_the_way = sequence.state.length % SNAPSHOT_INTERVAL == 0
            if sequence.shared and (sequence.prefilled == last or on_the_way):
                sequence.state.snapshot()
            if sampled is not None:
                prefilled.append((sequence, sampled))
        return prefilled

    def _commit(self) -> list[RunningSequence]:
        """Commit the accepted paths; returns the sequences that had one."""

        def commit(sequences: list[RunningSequence]) -> list[None]:
            self.backend.verifier.commit([(x.state, x.expect(Commit).path) for x in sequences])
            return [None] * len(sequences)

        committed = [x for x, _ in self._batch(self._pending(Commit), "commit", commit)]
        seen = [sequence.expect(Commit).seen for sequence in committed]
        observe([outcome for outcome in seen if outcome is not None])
        return committed

    def _observe(
        self,
        committed: list[RunningSequence],
        trees: dict[RequestId, DraftTree],
        lengths: dict[RequestId, int],
    ) -> None:
        """Let the adaptive budget of a method learn, if all sequences are of that method."""
        methods = {sequence.config.method for sequence in committed}
        if len(methods) != 1 or not all(sequence.config.is_adaptive for sequence in committed):
            return
        seconds: dict[Phase, float] = {}
        for sequence in committed:
            seconds |= sequence.seconds
        self.budget(methods.pop()).observe(
            [trees[sequence.request_id] for sequence in committed],
            [sequence.expect(Commit).path for sequence in committed],
            [lengths[sequence.request_id] for sequence in committed],
            seconds,
            first=any("draft" in x.seconds and not x.has_drafted for x in committed),
        )

    def _captures(self) -> int:
        """Count the functions that the backend has compiled or captured so far, if it does."""
        captures: int = getattr(self.backend, "captures", 0)
        return captures

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
            if not _concerns_few(error):
                raise
            if len(sequences) == 1:
                sequences[0].fail(error)
            else:
                for sequence in sequences:
                    yield from self._batch([sequence], phase, call)
            return
        for sequence in sequences:
            sequence.add_time(phase, started)
        yield from zip(sequences, outcomes, strict=True)


def _concerns_few(error: Exception) -> bool:
    """Return whether an error of a call may end the sequences of the call, and no others."""
    return isinstance(error, TreeflashError) or is_out_of_memory(error)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request that has not started; `leader` runs the same prompt and is to be forked."""

    request_id: RequestId
    request: Request
    leader: RequestId | None


class Scheduler:
    """Decodes many sequences with one loaded pair. It must not be called by two threads at once.

    Args:
        budgets: for the budget `auto`; they keep learning, and schedulers may share them. By
            default the costs of the target's forward passes are measured when they are needed.
        prefix_cache: takes the states of finished sequences and gives them to prompts that begin
            alike. The caller closes it.
        suffix_cache: takes the tokens of finished answers, which answers with the same salt may
            copy.
    """

    def __init__(
        self,
        backend: Backend,
        config: SchedulerConfig | None = None,
        *,
        budgets: AdaptiveBudgets | None = None,
        prefix_cache: PrefixCache | None = None,
        suffix_cache: SuffixCache | None = None,
    ) -> None:
        self.backend = backend
        self.config = config or SchedulerConfig()
        self.budgets = budgets or AdaptiveBudgets()
        self.prefix_cache = prefix_cache
        self.suffix_cache = suffix_cache
        self._waiting: list[_Waiting] = []
        self._running: list[RunningSequence] = []
        # of the first waiting request, from the disk
        self._restoration: tuple[RequestId, Restoration] | None = None
        self._last_id = 0

    @property
    def busy(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self._waiting or self._running)

    @property
    def running(self) -> int:
        """Sequences that have started."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that have not started."""
        return len(self._waiting)

    @property
    def committed_tokens(self) -> int:
        """Tokens of prompts and texts that the started sequences have committed."""
        return sum(sequence.state.length for sequence in self._running)

    @property
    def nbytes(self) -> int:
        """Device memory of the sequences that have started, bytes."""
        return sum(sequence.state.nbytes for sequence in self._running)

    def submit(self, request: Request) -> RequestId:
        """Add a sequence, which starts with one of the next iterations.

        Raises a PromptError if the prompt is empty, too long, or has tokens outside the vocabulary,
        and a ConfigError if the method needs a drafter or head that was not loaded, or the sequence
        alone needs more memory than the limit.
        """
        self.check(request)
        return self._add(request, None)

    def submit_group(
        self, requests: Sequence[Request], *, raises_limit: bool = False
    ) -> list[RequestId]:
        """Add sequences with the same prompt, which is run once.

        It is run twice if some sequences are drafted for and others are not: a state that was
        opened for plain decoding cannot be drafted for. With `raises_limit`, a sequence that alone
        needs more memory than the limit raises the limit, so that it can be decoded alone. Raises
        what `submit` does, and then adds no sequence.
        """
        if any(list(x.prompt_ids) != list(requests[0].prompt_ids) for x in requests):
            raise PromptError("the texts of a group must have the same prompt")
        limit = self.config.max_bytes
        if raises_limit and limit is not None:
            for request in requests:
                check(self.backend, request)
            limit = max(limit, *map(self.state_bytes, requests))
            self.config = replace(self.config, max_bytes=limit)
        for request in requests:
            self.check(request)
        leaders: dict[bool, RequestId] = {}
        request_ids = []
        for request in requests:
            leader = None if request.scores_prompt else leaders.get(request.config.drafts)
            request_ids.append(self._add(request, leader))
            leaders.setdefault(request.config.drafts, request_ids[-1])
        return request_ids

    def check(self, request: Request) -> None:
        """Raise the error that `submit` would raise. Any thread may call it."""
        check(self.backend, request)
        limit = self.config.max_bytes
        if limit is not None and (needed := self.state_bytes(request)) > limit:
            raise ConfigError(
                f"this sequence needs {needed / MIB:.3g} MiB for its KV cache and the limit is "
                f"{limit / MIB:.3g} MiB; shorten the prompt or lower max_tokens"
            )

    def state_bytes(self, request: Request) -> int:
        """Return the bytes that the state of a sequence may take."""
        return self.backend.state_nbytes(self._capacity(request), drafts=request.config.drafts)

    def run(self) -> Generator[Event, None, None]:
        """Iterate until all sequences are finished; yields their steps and errors.

        Sequences may be submitted and cancelled meanwhile. Closing the iterator drops all that are
        not finished.
        """
        try:
            while self.busy:
                yield from self.step()
        finally:
            self.close()

    def decode(self, requests: Iterable[Request]) -> Generator[tuple[int, Step], None, None]:
        """Run requests until all are finished; yields the number of a request and a step of it.

        Raises what `submit` does before anything is decoded. An error that ends a sequence is
        raised and drops the others, as closing the iterator does.
        """
        requests = list(requests)
        for request in requests:
            self.check(request)
        numbers = {self._add(request, None): number for number, request in enumerate(requests)}
        return self._decode(numbers)

    def _decode(self, numbers: dict[RequestId, int]) -> Generator[tuple[int, Step], None, None]:
        with closing(self.run()) as events:
            for request_id, event in events:
                if isinstance(event, Exception):
                    raise event
                yield numbers[request_id], event

    def step(self) -> list[Event]:
        """Run one iteration; returns the steps that it made, and errors that ended sequences."""
        events = self._admit()
        prefill_chunks = self.config.prefill_chunk, self.config.lone_prefill_chunk
        Iteration(self.backend, self._running, self._budget, prefill_chunks).run()
        for sequence in list(self._running):
            events += ((sequence.request_id, event) for event in sequence.events)
            self._measure_prefill(sequence)
            finished = sequence.pending is None
            failed = finished and isinstance(sequence.events[-1], Exception)
            sequence.events.clear()
            if finished:
                self._end(sequence, keep=not failed)
        self.store_states()
        return events

    @property
    def stores_states(self) -> bool:
        """Whether states wait to be copied to the disk tier of the prefix cache."""
        disk = None if self.prefix_cache is None else self.prefix_cache.disk
        return disk is not None and disk.has_unsaved

    def store_states(self) -> None:
        """Copy a few parts of states to the disk tier of the prefix cache, if there are any."""
        if self.prefix_cache is not None and self.prefix_cache.disk is not None:
            self.prefix_cache.disk.copy_next()

    def cancel(self, request_id: RequestId) -> None:
        """Drop a sequence, if it is not finished."""
        self._waiting = [x for x in self._waiting if x.request_id != request_id]
        if self._restoration is not None and self._restoration[0] == request_id:
            self._drop_restoration()
        for sequence in [x for x in self._running if x.request_id == request_id]:
            self._end(sequence)

    def close(self) -> None:
        """Drop all sequences."""
        self._waiting.clear()
        self._drop_restoration()
        for sequence in list(self._running):
            self._end(sequence)

    def _add(self, request: Request, leader: RequestId | None) -> RequestId:
        self._last_id += 1
        self._waiting.append(_Waiting(RequestId(self._last_id), request, leader))
        return RequestId(self._last_id)

    def _admit(self) -> list[Event]:
        """Start waiting requests, in order, while there is room; returns errors of the start."""
        errors: list[Event] = []
        while self._waiting and len(self._running) < self.config.max_parallel:
            first = self._waiting[0]
            leader = self._leader(first)
            if leader is not None and leader.state.length < len(first.request.prompt_ids) - 1:
                break  # it is still running the prompt
            if not self._make_room(first.request):
                break
            del self._waiting[0]
            try:
                if leader is None and not self._restore(first):
                    self._waiting.insert(0, first)
                    break  # its state is still being read
                self._start(first, leader)
            except MemoryInUseError as error:
                self._drop_restoration()
                if self.prefix_cache:  # its least recently used state makes room
                    self.prefix_cache.shrink(self.prefix_cache.nbytes - 1)
                    self._waiting.insert(0, first)
                elif self._running:  # the next one that ends makes room
                    self._waiting.insert(0, first)
                    break
                else:
                    errors.append((first.request_id, error))
            except Exception as error:
                if not _concerns_few(error):
                    raise
                self._drop_restoration()
                errors.append((first.request_id, error))
        return errors

    def _restore(self, waiting: _Waiting) -> bool:
        """Restore the beginning of a prompt from the disk; whether that has ended.

        Nothing is restored that the states in memory have, and nothing slower than the prefill.
        While no sequence is running, a call waits for the next part.
        """
        cache, request = self.prefix_cache, waiting.request
        if cache is None or cache.disk is None or request.scores_prompt:
            return True
        if self._restoration is None:
            prefix = request.prompt_ids[:-1]
            in_memory = cache.find(self._cache_key(request), prefix)
            cached = 0 if in_memory is None else in_memory[1]
            if len(prefix) < cached + cache.disk.block:
                return True
            opened = partial(
                self.backend.open, self._capacity(request), drafts=request.config.drafts
            )
            key = self._cache_key(request)
            restoration = cache.disk.restore(key, prefix, opened, cached)
            self._restoration = waiting.request_id, restoration
        return self._restoration[1].advance(wait=not self._running)

    def _drop_restoration(self) -> None:
        if self._restoration is not None:
            self._restoration[1].close()
        self._restoration = None

    def _leader(self, waiting: _Waiting) -> RunningSequence | None:
        """Find the running sequence to fork, if it has not ended and its state can be shared."""
        for sequence in self._running:
            if sequence.request_id == waiting.leader:
                shareable = self._cache_key(sequence.request) == self._cache_key(waiting.request)
                return sequence if shareable else None
        return None

    def _start(self, waiting: _Waiting, leader: RunningSequence | None) -> None:
        request = waiting.request
        # The prompt's last token is always run, because its logits give the first new token.
        prefix = request.prompt_ids[:-1]
        source: tuple[SequenceState, int] | None = None
        if leader is not None:
            source = leader.state, leader.state.restorable(len(prefix))
        elif self.prefix_cache is not None and not request.scores_prompt:
            source = self.prefix_cache.find(self._cache_key(request), prefix)
        cached = 0 if source is None else source[1]
        capacity = self._capacity(request)
        restored = None if self._restoration is None else self._restoration[1].state
        self._restoration = None
        if restored is not None:
            state, cached = restored, restored.length
        elif source is not None and cached:
            state = source[0].fork(cached, capacity)
        else:
            state = self.backend.open(capacity, drafts=request.config.drafts)
        loop = decode_loop(
            state,
            request.prompt_ids,
            request.config,
            self._limit(request),
            self.backend.vocab_size,
            constraint=request.constraint,
            scores_prompt=request.scores_prompt,
            cached_tokens=cached,
            disk_tokens=0 if restored is None else cached,
            shared=partial(self._finished_answers, request.cache_salt),
        )
        prompt = list(request.prompt_ids)
        sequence = RunningSequence(waiting.request_id, request, state, loop, prompt)
        is_leader = any(other.leader == waiting.request_id for other in self._waiting)
        sequence.shared = is_leader or self.prefix_cache is not None
        self._running.append(sequence)
        sequence.resume(None)

    def _make_room(self, request: Request | None = None, copied: int = 0) -> bool:
        """Shrink the prefix cache until the running sequences' states fit; whether they do.

        Room is made for a `request` that is to start, and for `copied` bytes of a state.
        """
        if self.config.max_bytes is None:
            return True
        if request is None and self._restoration is not None:
            request = self._waiting[0].request  # whose state is being restored
        # A state may grow up to its capacity.
        requests = [sequence.request for sequence in self._running]
        reserved = self._states_bytes(requests if request is None else [*requests, request])
        free = self.config.max_bytes - reserved - copied
        if free >= 0 and self.prefix_cache is not None:
            self.prefix_cache.shrink(free)
        return free >= 0

    def _states_bytes(self, requests: Sequence[Request]) -> int:
        """Return the bytes that the states of sequences that run together may take."""
        if (states_nbytes := getattr(self.backend, "states_nbytes", None)) is None:
            return sum(map(self.state_bytes, requests))
        nbytes: int = states_nbytes([(self._capacity(x), x.config.drafts) for x in requests])
        return nbytes

    def _end(self, sequence: RunningSequence, *, keep: bool = False) -> None:
        """Remove a sequence; with `keep` the caches may take its state and its answer."""
        if keep and self.suffix_cache is not None:
            request = sequence.request
            answer = sequence.tokens[len(request.prompt_ids) :]
            self.suffix_cache.add(request.cache_salt, answer)
        try:
            if keep and self.prefix_cache is not None:
                self._cache(sequence, self.prefix_cache)
        finally:
            self._running.remove(sequence)
            sequence.close()

    def _cache(self, sequence: RunningSequence, cache: PrefixCache) -> None:
        """Copy the state of a finished sequence into the prefix cache, if there is memory."""
        # A stop may have cut off the tokens of the last positions.
        length = sequence.state.restorable(len(sequence.tokens))
        nbytes = self.backend.state_nbytes(length, drafts=sequence.config.drafts)
        if not length or nbytes > cache.max_bytes or not self._make_room(copied=nbytes):
            return
        try:
            # A fork does not have the room for further tokens.
            state = sequence.state.fork(length, length)
        except Exception as error:
            if not _concerns_few(error):  # the answer is complete; only later prompts take longer
                raise
            return
        cache.put(self._cache_key(sequence.request), sequence.tokens[:length], state)

    def _finished_answers(self, salt: str) -> list[SuffixIndex]:
        """Return the indices over finished answers that a sequence may copy."""
        return [] if self.suffix_cache is None else self.suffix_cache.indices(salt)

    def _limit(self, request: Request) -> int:
        """Return the most new tokens."""
        room = self.backend.max_positions - len(request.prompt_ids)
        return min(request.config.max_tokens, room)

    def _capacity(self, request: Request) -> int:
        """Return the sequence's positions, the nodes of its largest tree included."""
        config = request.config
        nodes = 1
        if config.is_adaptive:
            nodes = self._budget(config.method).largest
        elif config.speculates:
            nodes = int(config.budget)
        if request.scores_prompt:
            nodes = max(nodes, SCORED_TOKENS)
        return len(request.prompt_ids) + self._limit(request) + nodes

    def _measure_prefill(self, sequence: RunningSequence) -> None:
        """Note what the prefill of a sequence cost, if it has just ended."""
        if self.prefix_cache is None or self.prefix_cache.disk is None:
            return
        for step in sequence.events:
            if isinstance(step, Step) and "prefill" in step.seconds:
                run = len(sequence.request.prompt_ids) - step.cached_tokens
                if run >= self.prefix_cache.disk.block:
                    self.prefix_cache.disk.rates.prefill_s = step.seconds["prefill"] / run

    def _cache_key(self, request: Request) -> CacheKey:
        """Return the key of sequences that share states; the loaded pair is a part of it."""
        return CacheKey(self.backend, request.config.drafts, request.cache_salt)

    def _budget(self, method: Method) -> AdaptiveBudget:
        return self.budgets.get(method, lambda: VerifyCosts.measure(self.backend))


def decode(
    backend: Backend, request: Request, budgets: AdaptiveBudgets | None = None
) -> Generator[Step, None, None]:
    """Decode one sequence step by step. Closing the iterator early loses nothing already yielded.

    Raises what `Scheduler.submit` raises, and a NumericalError if a model produced values that are
    not finite. `budgets`, for the budget `auto`, keep learning and may be shared by sequences of
    the same pair; None measures new ones, which takes about a second. They never change a token.
    """
    return _steps(Scheduler(backend, budgets=budgets).decode([request]))


def _steps(events: Generator[tuple[int, Step], None, None]) -> Generator[Step, None, None]:
    with closing(events):
        for _, step in events:
            yield step
