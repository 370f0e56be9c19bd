"""Options of tables; and tables from logits on the host, for backends that do not make them.

The drafter gives (D, vocab) float32 logits of the marginals, and its head a function that scores
tokens after previous ones; everything that `TableOptions` asks for follows from them. Tokens that
cannot be drafted have -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import AUTO, DecodeConfig
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.sampling import Noise
from treeflash.decoding.transitions import TransitionTable

ROWS_PER_NODE, MIN_ROWS = 4, 16
"""Rows of the AR head for a tree: on average the block efficiency stays within 1.5 % of that with
all rows for 8 nodes, and within 1 % for more (docs/history.md)."""
TOKENS_PER_NODE, MIN_TOKENS = 32, 256
"""Tokens that the AR head scores for a tree, if no fewer are asked for; 256 change the block
efficiency of 8 nodes by 0.1 %."""

Logits: TypeAlias = NDArray[np.float32]
Tokens: TypeAlias = NDArray[np.int32]
Score: TypeAlias = Callable[[Tokens, Tokens, Tokens], Logits]
"""From (n,) depths, counted from 0, (n,) previous tokens, and (v,) tokens to score after each of
them: the (n, v) logits of the head, at temperature 1 and without noise."""
Confidence: TypeAlias = Callable[[Tokens, Tokens], NDArray[np.float32]]
"""From the same depths and previous tokens: the (n,) probability that each row is right."""


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


def log_softmax(logits: Logits) -> Logits:
    """Return log probabilities over the last axis."""
    highest = logits.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a table of what is not finite is refused later
        shifted = logits - highest
    result: Logits = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def marginal_table(logits: Logits, options: TableOptions) -> TransitionTable:
    """Return the table of `Drafter.marginals` for one block."""
    tokens = np.arange(logits.shape[1], dtype=np.int32)
    log_probs = _heated(logits, options, np.arange(len(logits), dtype=np.int32), tokens)
    best = _best(log_probs, options.k)
    return TransitionTable.from_marginals(tokens[best], np.take_along_axis(log_probs, best, -1))


def head_table(
    logits: Logits,
    root: int,
    score: Score,
    options: TableOptions,
    confidence: Confidence | None = None,
) -> TransitionTable:
    """Return the table of `ARHead.transitions` for one block of a head that is not recurrent.

    All probabilities are of logits with noise, divided by the temperature. The shortlist has the
    tokens whose marginal probability is highest at any depth. A row distributes over it the
    probability that the marginal of the row's depth gives to the shortlist.
    """
    depths, vocab_size = logits.shape
    tokens = np.arange(vocab_size, dtype=np.int32)
    marginals = _heated(logits, options, np.arange(depths, dtype=np.int32), tokens)
    share = np.zeros((depths, 1), np.float32)
    if options.shortlist is not None and options.shortlist < vocab_size:
        tokens = np.sort(_best(marginals.max(0), options.shortlist)).astype(np.int32)
        marginals = marginals[:, tokens]
        share = np.log(np.exp(marginals).sum(-1, keepdims=True))
    best = _best(marginals[:-1], options.m)
    previous, m = tokens[best], best.shape[1]
    rows = np.arange(previous.size)  # rows of the depths after the first
    if options.rows is not None and options.rows < previous.size:
        weights = np.take_along_axis(marginals[:-1], best, -1).ravel()
        rows = np.sort(_best(weights, options.rows))
        previous = _scattered(previous.ravel()[rows], rows, previous.size, -1).reshape(-1, m)
    # The root's row comes first, as the first of M at depth 1.
    places = np.append(0, m + rows)
    slots = (places // m).astype(np.int32)
    before = np.append(root, previous.ravel()[rows]).astype(np.int32)
    log_probs = _heated(score(slots, before, tokens), options, slots, tokens) + share[slots]
    children = _best(log_probs, options.k)
    log_probs = np.take_along_axis(log_probs, children, -1)

    def dense(x: NDArray[Any], absent: float) -> NDArray[Any]:
        return _scattered(x, places, depths * m, absent).reshape(depths, m, *x.shape[1:])

    return TransitionTable.from_candidates(
        previous,
        dense(tokens[children], 0),
        dense(log_probs, -np.inf),
        None if confidence is None else dense(confidence(slots, before), 0),
    )


def _heated(logits: Logits, options: TableOptions, slots: Tokens, tokens: Tokens) -> Logits:
    """Return (n, v) log probabilities of logits at (n,) slots, with noise and temperature."""
    if options.noise is not None:
        noise = Noise(options.noise.keys[slots], options.noise.scales[slots])
        logits = logits + noise.values(tokens)
    return log_softmax(logits / np.float32(options.temperature))


def _best(x: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the indices of the k largest along the last axis, ties by index."""
    return np.argsort(-x, axis=-1, kind="stable")[..., :k]


def _scattered(x: NDArray[Any], places: NDArray[Any], size: int, absent: float) -> NDArray[Any]:
    """Return an array of `size` rows that has the rows of x at some places."""
    wide = np.full((size, *x.shape[1:]), absent, x.dtype)
    wide[places] = x
    return wide
