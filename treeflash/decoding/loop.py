"""The decode loop: the only one, for every method and every backend. It calls none of them.

The loop of one text is a generator. It yields what it needs and is sent the outcome; it yields a
`Step` whenever tokens are committed. `treeflash.decoding.scheduler` runs the loops of many texts.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import AUTO, DecodeConfig
from treeflash.decoding.acceptance import accept
from treeflash.decoding.calibration import Calibration
from treeflash.decoding.choices import Choice, Chosen, LogProbs
from treeflash.decoding.constraints import Constraint, constrain, prune
from treeflash.decoding.penalties import PenaltyState
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, build_chain, build_tree

Phase: TypeAlias = Literal["prefill", "draft", "tree", "verify", "commit"]


@dataclass(frozen=True, eq=False)
class Step:
    """The result of one target forward pass: the prefill first, then one step per iteration.

    Attributes:
        tokens: newly committed tokens; ends at a stop token or at the limit.
        seconds: wall time by phase; of the whole batch if several texts run together.
        tree: the tree that was verified; None for the prefill.
        path: (a,) node indices of the accepted path, before any stop cut it; None for the prefill.
        finish_reason: `stop` or `length` in the last step, None before.
        table: what the tree was built from, calibrated; None for the prefill and in plain decoding.
        log_probs: of `tokens`, if the configuration asks for them.
        cached_tokens: prompt tokens that came from a prefix cache; 0 after the prefill.
    """

    tokens: tuple[int, ...]
    seconds: dict[Phase, float] = field(default_factory=dict)
    tree: DraftTree | None = None
    path: NDArray[np.int32] | None = None
    finish_reason: str | None = None
    table: TransitionTable | None = None
    log_probs: LogProbs | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, eq=False)
class Extend:
    """Commit these tokens and choose the next one; the outcome is a `Chosen` of one token."""

    token_ids: Sequence[int]
    choice: Choice


@dataclass(frozen=True, eq=False)
class Draft:
    """Draft after this root; the outcome is `Drafted`, or None if drafting does not pay now."""

    root: int


@dataclass(frozen=True, eq=False)
class Drafted:
    """The outcome of a draft.

    Attributes:
        table: what may follow what.
        nodes: how large a tree to build from it.
    """

    table: TransitionTable
    nodes: int


@dataclass(frozen=True, eq=False)
class Cut:
    """Cut this tree to the nodes that pay; the outcome is (n,) those nodes, as in `subset`."""

    tree: DraftTree


@dataclass(frozen=True, eq=False)
class Verify:
    """Verify this tree; the outcome is a `Chosen` of a token per node."""

    tree: DraftTree
    choice: Choice


@dataclass(frozen=True, eq=False)
class Commit:
    """Commit this path of the tree verified last; the outcome is None."""

    path: NDArray[np.int32]


Need: TypeAlias = Extend | Draft | Cut | Verify | Commit
Loop: TypeAlias = Generator[Need | Step, Any, None]


def decode_loop(
    prompt_ids: Sequence[int],
    config: DecodeConfig,
    limit: int,
    vocab_size: int,
    *,
    constraint: Constraint | None = None,
    cached_tokens: int = 0,
) -> Loop:
    """Decode one text.

    Args:
        prompt_ids: the prompt.
        config: how to decode.
        limit: new tokens at most.
        vocab_size: of the target.
        constraint: of the generated tokens, none of which it has seen.
        cached_tokens: how many tokens of the prompt are committed already; fewer than all.
    """
    penalties = PenaltyState(config.penalties, prompt_ids)
    # A chain is the same at every exponent; a constraint makes the target choose what it would not.
    calibrated = not config.drafts_chain and constraint is None
    calibration = Calibration(vocab_size) if calibrated else None

    def choice(tree: DraftTree, emitted: int, allowed: NDArray[np.uint32] | None) -> Choice:
        """How to choose at the nodes of a tree whose root is the newest emitted token."""
        return replace(
            Choice.at(config.sampling, tree.positions(len(prompt_ids) + emitted)),
            edits=penalties.edits(tree),
            allowed=allowed,
            log_probs=config.log_probs,
        )

    emitted = 0
    allowed = None if constraint is None else constraint.allowed()[None]
    tree = DraftTree.root_only(prompt_ids[-1])
    chosen: Chosen = yield Extend(prompt_ids[cached_tokens:], choice(tree, emitted, allowed))
    tokens, finish_reason = _until_stop((int(chosen.tokens[0]),), config, limit)
    yield Step(
        tokens,
        finish_reason=finish_reason,
        log_probs=chosen.log_probs,
        cached_tokens=cached_tokens,
    )
    while finish_reason is None:
        emitted += len(tokens)
        penalties.add(tokens)
        if constraint is not None:
            for token in tokens:
                constraint.advance(token)
        tree, table, allowed = DraftTree.root_only(tokens[-1]), None, None
        # Each accepted node adds a token, and so does the last node's choice. What lies deeper
        # could not be emitted, and would stand beyond the last position.
        deepest = limit - emitted - 1
        drafted: Drafted | None = None
        if config.drafts and deepest:
            drafted = yield Draft(tokens[-1])
        if drafted is not None:
            table = drafted.table.until(deepest)
            if calibration is not None:
                table = calibration.correct(table)
            if constraint is not None:
                table = prune(table, constraint.allowed(), vocab_size)
            build = build_chain if config.drafts_chain else build_tree
            tree = build(table, tokens[-1], drafted.nodes)
        if constraint is not None:
            tree, allowed = constrain(tree, constraint)
        if table is not None and config.budget == AUTO:
            nodes: NDArray[np.int64] = yield Cut(tree)
            tree, allowed = tree.subset(nodes), None if allowed is None else allowed[nodes]
        chosen = yield Verify(tree, choice(tree, emitted, allowed))
        accepted = accept(tree, chosen.tokens)
        if calibration is not None and drafted is not None:
            calibration.observe(drafted.table, accepted.tokens)
        yield Commit(accepted.path)
        tokens, finish_reason = _until_stop(accepted.tokens, config, limit - emitted)
        log_probs = chosen.log_probs
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


def _until_stop(
    tokens: tuple[int, ...], config: DecodeConfig, room: int
) -> tuple[tuple[int, ...], str | None]:
    """The tokens, `room` at most, up to the first stop token; and what ends the text, if any."""
    for i, token in enumerate(tokens):
        if token in config.stop_token_ids:
            return tokens[: i + 1], "stop"
    return tokens, "length" if len(tokens) == room else None
