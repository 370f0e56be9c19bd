"""The decode loop: the only one, for every method and every backend."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import AUTO, DecodeConfig
from treeflash.decoding.acceptance import accept
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Backend, Block, Drafter, TreeVerifier
from treeflash.decoding.sampling import uniforms
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, build_chain, build_tree
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.errors import ConfigError, PromptError

ROWS_OF_A_NODE, FEWEST_ROWS = 4, 32
"""Of the AR head, for a tree: in the mean block efficiency stays within 1.5 % of all rows' with 8
nodes, and within 1 % with more (docs/performance.md)."""

Phase: TypeAlias = Literal["prefill", "draft", "tree", "verify", "commit"]


@dataclass(frozen=True, eq=False)
class Step:
    """The result of one target forward pass: the prefill first, then one step per iteration.

    Attributes:
        tokens: newly committed tokens; ends at a stop token or at the limit.
        seconds: time spent, by phase.
        tree: the tree that was verified; None for the prefill.
        path: (a,) node indices of the accepted path, before any stop cut it; None for the prefill.
        finish_reason: `stop` or `length` in the last step, None before.
        table: what the tree was built from; None for the prefill and in plain decoding.
    """

    tokens: tuple[int, ...]
    seconds: dict[Phase, float]
    tree: DraftTree | None = None
    path: NDArray[np.int32] | None = None
    finish_reason: str | None = None
    table: TransitionTable | None = None


def decode(
    backend: Backend,
    prompt_ids: Sequence[int],
    config: DecodeConfig,
    adaptive_budget: AdaptiveBudget | None = None,
) -> Iterator[Step]:
    """Decode one text step by step. Closing the iterator early loses nothing already yielded.

    Args:
        backend: a loaded pair.
        prompt_ids: the prompt, at least one token.
        config: method, budget, limits, sampling.
        adaptive_budget: for the budget `auto`; it keeps learning and may be shared by texts of the
            same pair and method. None measures a new one, which takes about a second. It never
            changes a token.

    Raises:
        PromptError: the prompt is empty, too long, or has tokens outside the vocabulary.
        ConfigError: the method needs a drafter, or a head, that was not loaded.
        NumericalError: a model produced values that are not finite.
    """
    check(backend, prompt_ids, config)
    limit = min(config.max_tokens, backend.max_positions - len(prompt_ids))
    if config.budget != AUTO or not config.drafts:
        adaptive_budget = None
    elif adaptive_budget is None:
        adaptive_budget = AdaptiveBudget(VerifyCosts.measure(backend))
    return _decode(backend, prompt_ids, config, limit, adaptive_budget)


def check(backend: Backend, prompt_ids: Sequence[int], config: DecodeConfig) -> None:
    """Raise the error that decoding this prompt in this way would meet, if any."""
    if config.drafts and backend.drafter_config is None:
        raise ConfigError(
            f"method {config.method} needs a drafter and none was loaded; pass --drafter, "
            "or --method ar"
        )
    if config.uses_head and backend.head is None:
        raise ConfigError(
            f"method {config.method} needs a TreeFlash drafter, and this one has no AR head; "
            "use --method ddtree or --method dflash"
        )
    if not len(prompt_ids):
        raise PromptError("the prompt is empty; give at least one token")
    if len(prompt_ids) >= backend.max_positions:
        raise PromptError(
            f"the prompt has {len(prompt_ids)} tokens and the target's limit is "
            f"{backend.max_positions}, new tokens included; shorten the prompt"
        )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < backend.vocab_size:
        raise PromptError(
            f"the prompt has token ids outside the target's vocabulary of {backend.vocab_size}; "
            "was it encoded with another model's tokenizer?"
        )


def _decode(
    backend: Backend,
    prompt_ids: Sequence[int],
    config: DecodeConfig,
    limit: int,
    adaptive_budget: AdaptiveBudget | None,
) -> Iterator[Step]:
    with closing(backend.verifier(features=config.drafts)) as verifier:
        yield from _steps(backend, verifier, prompt_ids, config, limit, adaptive_budget)


def _steps(
    backend: Backend,
    verifier: TreeVerifier,
    prompt_ids: Sequence[int],
    config: DecodeConfig,
    limit: int,
    adaptive_budget: AdaptiveBudget | None,
) -> Iterator[Step]:
    sampling = config.sampling
    clock = _Clock()
    drafter = backend.drafter() if config.drafts else None
    root, features = verifier.prefill(
        prompt_ids, sampling, _draws(config, np.array([len(prompt_ids)], np.int32))
    )
    clock.mark("prefill")
    tokens, finish_reason = _cut((root,), config, limit)
    emitted, first = len(tokens), True
    yield Step(tokens, clock.seconds, finish_reason=finish_reason)

    while finish_reason is None:
        clock = _Clock()
        tree = DraftTree.root_only(root)
        table: TransitionTable | None = None
        # Each node that is accepted brings a token, and so does the last node's choice. What lies
        # deeper could not be emitted, and would stand beyond the last position.
        deepest = limit - emitted - 1
        if drafter is None or not deepest:
            pass
        elif adaptive_budget is not None and not adaptive_budget.begin():
            drafter.extend(features)
        else:
            if config.budget != AUTO:
                expected = built = config.budget
            else:
                assert adaptive_budget is not None
                expected, built = adaptive_budget.nodes, adaptive_budget.largest
            block = drafter.draft(features, root)
            table = propose(backend, drafter, block, config, expected).until(deepest)
            clock.mark("draft")
            tree = (build_chain if config.drafts_chain else build_tree)(table, root, built)
            if adaptive_budget is not None:
                tree = adaptive_budget.cut(tree)
            clock.mark("tree")
        draws = _draws(config, tree.positions(verifier.length + 1))
        chosen = verifier.verify(tree, sampling, draws)
        clock.mark("verify")
        accepted = accept(tree, chosen)
        features = verifier.commit(accepted.path)
        root = accepted.tokens[-1]
        clock.mark("commit")
        if adaptive_budget is not None:
            adaptive_budget.observe(tree, accepted.path, clock.seconds, first=first)
            first = first and table is None
        tokens, finish_reason = _cut(accepted.tokens, config, limit - emitted)
        emitted += len(tokens)
        yield Step(tokens, clock.seconds, tree, accepted.path, finish_reason, table)


def propose(
    backend: Backend, drafter: Drafter, block: Block, config: DecodeConfig, nodes: int
) -> TransitionTable:
    """The table that a method builds its chain, or its tree of about so many nodes, from."""
    k, temperature = config.top_k_children, config.draft_temperature
    if config.uses_head:
        assert backend.head is not None
        # A chain takes the first row of each depth.
        m, rows = (1, None) if config.drafts_chain else (config.top_m, config.head_rows)
        if rows == AUTO:
            rows = max(ROWS_OF_A_NODE * nodes, FEWEST_ROWS)
        return backend.head.transitions(
            block, m, k, temperature, shortlist=config.head_vocab, rows=rows
        )
    return drafter.marginals(block, 1 if config.drafts_chain else k, temperature)


def _draws(config: DecodeConfig, positions: NDArray[np.int32]) -> NDArray[np.float64] | None:
    return None if config.sampling.greedy else uniforms(config.sampling.seed, positions)


def _cut(
    tokens: tuple[int, ...], config: DecodeConfig, room: int
) -> tuple[tuple[int, ...], str | None]:
    """The tokens, `room` at most, up to the first stop token; and what ends the text, if any."""
    for i, token in enumerate(tokens):
        if token in config.stop_token_ids:
            return tokens[: i + 1], "stop"
    return tokens, "length" if len(tokens) == room else None


@dataclass
class _Clock:
    """Splits elapsed time into phases."""

    seconds: dict[Phase, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def mark(self, phase: Phase) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self.last
        self.last = now
