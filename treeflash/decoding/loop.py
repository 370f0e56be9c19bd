"""The decode loop of one sequence: the only loop, for every method and every backend.

`decode_loop` is a generator that makes no calls. It yields one piece of work at a time, waits, and
is sent the outcome; it yields a `Step` whenever tokens are committed. Whoever runs it carries out
the work: `treeflash.decoding.scheduler` does so for the loops of many sequences at once.

    yields    the caller                             sends back            the loop then yields
    Prefill   commits the prompt                     SampledTokens         Step
    Step      hands out the tokens                   nothing               Draft, Verify, or ends
    Draft     proposes trees, if drafting pays       Drafted or None       Prune or Verify
    Prune     chooses the nodes that pay             their (n,) indices    Verify
    Verify    runs the target over the tree          SampledTokens         Commit
    Commit    keeps the accepted path                nothing               Step

The loop starts with `Prefill`, unless the prompt is scored: then chains of its tokens are verified
and committed first, and `Prefill` has the last token alone. The loop ends after the step with a
finish reason. It yields `Draft` if the method speculates and room is left for more than one token,
and `Prune` if the budget is `auto` and a tree was drafted. A constraint drafts what it forces, so
that a draft may have neither table nor copies. Without a draft, `Verify` has the tree of the root
alone: plain decoding. An error is raised by whoever carries out the work; the loop is
then closed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import DecodeConfig
from treeflash.decoding.batch_trees import Outcome
from treeflash.decoding.interfaces import Prefill, SequenceState, Verify
from treeflash.decoding.merged_trees import Choices, merge, merge_allowed
from treeflash.decoding.request import Request
from treeflash.decoding.sampling import (
    LogProbs,
    PenaltyState,
    SampledTokens,
    SamplingParams,
    only,
)
from treeflash.decoding.suffix import (
    SEPARATOR,
    SuffixDrafter,
    SuffixIndex,
    SuffixTree,
    tree_of,
)
from treeflash.decoding.transitions import Calibration, TransitionTable
from treeflash.decoding.tree import DraftTree, accept, build_chain, build_tree

Phase: TypeAlias = Literal["prefill", "draft", "tree", "verify", "commit"]


@dataclass(frozen=True, eq=False)
class Step:
    """The result of one target forward pass: the prefill first, then one step per iteration.

    Attributes:
        tokens: newly committed tokens; ends at a stop token or at the limit.
        seconds: wall time by phase; of the whole batch if several sequences run together.
        tree: the tree that was verified; None for the prefill.
        path: (a,) node indices of the accepted path, before a stop cut it; None for the prefill.
        finish_reason: `stop` or `length` in the last step, None before.
        table: the drafter's table that the tree was built from, calibrated unless the configuration
            says otherwise; None if it did not draft.
        log_probs: of `tokens`, if the configuration asks for them.
        prompt_log_probs: of the prompt's tokens after the first one, if the request asks for them;
            None after the prefill.
        cached_tokens: prompt tokens that came from a prefix cache; 0 after the prefill.
        disk_tokens: how many of the cached tokens came from its disk tier.
    """

    tokens: tuple[int, ...]
    seconds: dict[Phase, float] = field(default_factory=dict, repr=False)
    tree: DraftTree | None = None
    path: NDArray[np.int32] | None = field(default=None, repr=False)
    finish_reason: str | None = None
    table: TransitionTable | None = field(default=None, repr=False)
    log_probs: LogProbs | None = field(default=None, repr=False)
    prompt_log_probs: LogProbs | None = field(default=None, repr=False)
    cached_tokens: int = 0
    disk_tokens: int = 0

    @property
    def accepted_tokens(self) -> int:
        """The number of drafts that the text got; drafts after its end may have been right too."""
        return 0 if self.path is None else min(len(self.path) - 1, len(self.tokens))


Event: TypeAlias = tuple[Request, Step | Exception]
"""A step of a sequence, or the error that ended it."""


@dataclass(frozen=True, eq=False)
class Draft:
    """Draft after the newest token, `root`, up to `depths`, which can be accepted at most.

    The outcome is `Drafted`, or None if drafting does not pay now. `suffix` proposes what followed
    earlier occurrences; None if it is not asked to. `calibration` is for the drafter's table; None
    if the loop itself makes the tree. `constrained` says whether a constraint may force tokens.
    """

    root: int
    depths: int
    suffix: SuffixDrafter | None
    calibration: Calibration | None = None
    constrained: bool = False


@dataclass(frozen=True, eq=False)
class Drafted:
    """The outcome of a draft: the drafter's table or a proposal of copies, or both.

    Under a constraint, which drafts too, there may be neither.

    `nodes` is the size of the tree to build. `grown` is the calibrated table with its tree, if they
    were made for all sequences at once.
    """

    table: TransitionTable | None
    nodes: int
    proposal: SuffixTree | None = None
    grown: tuple[TransitionTable, DraftTree] | None = None


@dataclass(frozen=True, eq=False)
class Prune:
    """Choose the nodes of this tree that pay. The outcome is (n,) nodes, as in `subset`."""

    tree: DraftTree


@dataclass(frozen=True, eq=False)
class Commit:
    """Commit this path of the tree that was verified last. The outcome is None.

    `seen` is for `observe`, which whoever commits calls for all sequences at once.
    """

    path: NDArray[np.int32]
    seen: Outcome | None = None


SCORED_TOKENS = 64
"""Tokens of a prompt that are scored at once; the logits of all of them are in memory."""

Work: TypeAlias = Prefill | Draft | Prune | Verify | Commit
Loop: TypeAlias = Generator[Work | Step, Any, None]


def decode_loop(
    request: Request,
    state: SequenceState,
    limit: int,
    vocab_size: int,
    *,
    cached_tokens: int = 0,
    disk_tokens: int = 0,
    choices: Choices,
    shared: Callable[[], Sequence[SuffixIndex]] = lambda: (),
) -> Loop:
    """Decode one sequence with `limit` new tokens at most; see the module's table.

    Args:
        request: its constraint has seen no token.
        state: the loop passes it on and never looks into it.
        limit: new tokens at most.
        vocab_size: of the target.
        cached_tokens: tokens of the prompt that are committed already; fewer than all, and none if
            the prompt is scored.
        disk_tokens: how many of the cached tokens came from a disk.
        choices: what targets chose under constraints; the loop reads it and adds to it.
        shared: gives indices over other texts, for a configuration that copies.
    """
    prompt_ids, config, constraint = request.prompt_ids, request.config, request.constraint
    stops = config.stop_token_ids
    if constraint is not None:
        # A complete text allows nothing but these, which would be repeated up to the limit.
        stops |= constraint.end_tokens
    # A chain is the same at every exponent. Under a constraint the target's tokens are not those
    # that a calibration could learn from.
    calibrated = (
        config.calibration and config.drafts and not config.drafts_chain and constraint is None
    )
    calibration = Calibration(vocab_size) if calibrated else None
    text = prompt_ids if request.images is None else request.images.as_text(prompt_ids)
    suffix = SuffixDrafter(text, shared) if config.copies else None
    # A placeholder of an image is no text, and may be outside of the vocabulary.
    penalties = PenaltyState(config.penalties, [token for token in text if token != SEPARATOR])

    def params(tree: DraftTree, emitted: int, allowed: NDArray[np.uint32] | None) -> SamplingParams:
        """Return how to sample at the nodes of a tree whose root is the newest emitted token."""
        positions = tree.positions(len(prompt_ids) + emitted)
        edits = penalties.edits(tree)
        return SamplingParams.from_positions(
            config.sampling, positions, edits, allowed, config.log_probs
        )

    seen_choices = partial(choices.seen, request.cache_salt)

    def note_choices(masks: NDArray[np.uint32] | None, tokens: Sequence[int]) -> None:
        """Note what the target chose at nodes with these masks."""
        if masks is not None and config.speculates:
            for mask, token in zip(masks, tokens, strict=True):
                choices.observe(request.cache_salt, mask, token)

    scores: list[LogProbs] = []
    if request.scores_prompt:
        for start in range(0, len(prompt_ids) - 1, SCORED_TOKENS):
            chunk = np.array(prompt_ids[start : start + SCORED_TOKENS + 1], np.int32)
            forced = SamplingParams(
                allowed=only(chunk[1:], vocab_size), log_probs=config.log_probs or 0
            )
            scored: SampledTokens = yield Verify(state, DraftTree.chain(chunk[:-1]), forced)
            assert scored.log_probs is not None
            scores.append(scored.log_probs)
            yield Commit(np.arange(len(chunk) - 1, dtype=np.int32))
        cached_tokens = len(prompt_ids) - 1
    emitted = 0
    allowed = None if constraint is None else constraint.allowed()[None]
    tree = DraftTree.root_only(prompt_ids[-1])
    sampled: SampledTokens = yield Prefill(
        state, prompt_ids[cached_tokens:], params(tree, emitted, allowed), request.images
    )
    tokens, finish_reason = _cut_at_stop((int(sampled.tokens[0]),), stops, limit)
    note_choices(allowed, tokens)
    yield Step(
        tokens,
        finish_reason=finish_reason,
        log_probs=sampled.log_probs,
        prompt_log_probs=LogProbs.concatenate(scores) if scores else None,
        cached_tokens=0 if scores else cached_tokens,
        disk_tokens=disk_tokens,
    )
    if suffix is not None:
        suffix.observe(tokens)
    while finish_reason is None:
        emitted += len(tokens)
        penalties.add(tokens)
        if constraint is not None:
            for token in tokens:
                constraint.advance(token)
        tree, table, allowed = DraftTree.root_only(tokens[-1]), None, None
        # Each accepted node emits a token, and the last node one more. Deeper nodes could not be
        # emitted, and would stand beyond the last position.
        deepest = limit - emitted - 1
        drafted: Drafted | None = None
        if config.speculates and deepest:
            drafted = yield Draft(
                tokens[-1], deepest, suffix, calibration, constrained=constraint is not None
            )
        if drafted is not None and drafted.grown is not None:
            table, tree = drafted.grown
        elif drafted is not None:
            if drafted.table is not None:
                table = drafted.table.truncate(min(deepest, config.draft_depths or deepest))
                if calibration is not None:
                    table = calibration.correct(table)
            if constraint is None:
                tree = _build(table, drafted, tokens[-1], config)
            else:
                tree, allowed = merge_allowed(
                    table,
                    drafted.proposal,
                    tokens[-1],
                    drafted.nodes,
                    constraint,
                    seen_choices,
                    deepest=deepest,
                    stops=stops,
                    chain=config.drafts_chain,
                )
        if constraint is not None and allowed is None:
            allowed = constraint.allowed()[None]
        if drafted is not None and config.is_adaptive:
            nodes: NDArray[np.int64] = yield Prune(tree)
            tree, allowed = tree.subset(nodes), None if allowed is None else allowed[nodes]
        sampled = yield Verify(state, tree, params(tree, emitted, allowed))
        accepted = accept(tree, sampled.tokens)
        seen: Outcome | None = None
        if calibration is not None and drafted is not None and drafted.table is not None:
            seen = Outcome(calibration, drafted.table, accepted.tokens)
        if suffix is not None:
            suffix.observe(accepted.tokens)
        note_choices(None if allowed is None else allowed[accepted.path], accepted.tokens)
        yield Commit(accepted.path, seen)
        tokens, finish_reason = _cut_at_stop(accepted.tokens, stops, limit - emitted)
        log_probs = sampled.log_probs
        if log_probs is not None:
            log_probs = log_probs.rows(accepted.path[: len(tokens)])
        yield Step(
            tokens,
            tree=tree,
            path=accepted.path,
            finish_reason=finish_reason,
            table=table,
            log_probs=log_probs,
        )


def _build(
    table: TransitionTable | None, drafted: Drafted, root: int, config: DecodeConfig
) -> DraftTree:
    """Build the draft tree of a corrected table, of a proposal, or of both."""
    if table is None:
        assert drafted.proposal is not None
        return tree_of(drafted.proposal, root, drafted.nodes)
    if drafted.proposal is not None:
        return merge(table, drafted.proposal, root, drafted.nodes)
    build = build_chain if config.drafts_chain else build_tree
    return build(table, root, drafted.nodes)


def _cut_at_stop(
    tokens: tuple[int, ...], stops: Set[int], room: int
) -> tuple[tuple[int, ...], str | None]:
    """Cut at `room` tokens or after the first stop token; return the finish reason, if any."""
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[: i + 1], "stop"
    return tokens, "length" if len(tokens) == room else None
