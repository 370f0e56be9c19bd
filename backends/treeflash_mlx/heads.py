"""The tables of conditional heads, whose mathematics is in `treeflash.drafters.heads`.

The scores of a `ConditionalHead` depend on the slot and on one previous token, and `ARHead` scores
all slots of all sequences together. A `RecurrentCell` has a state for the path of previous tokens,
and `RecurrentHead` follows the paths depth by depth. All scores are logits before the temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.output_stage import Block
from treeflash.decoding.recurrent_head import RecurrentHead
from treeflash.decoding.transitions import RowBatch, TransitionTable
from treeflash.drafters.heads import operations
from treeflash.drafters.heads.operations import ConditionalHead, Slots
from treeflash_mlx.drafter import OutputStage
from treeflash_mlx.drafter_model import read
from treeflash_mlx.numerics import log_softmax, logsumexp, top_indices, top_log_probs


class ScoredTokens(operations.ScoredTokens):
    """The tokens that the children of (batch, n) rows are chosen from, which count depths from 0.

    The marginals are (batch, D, v). The tokens are (batch, 1, v), or (batch, D, v) for a head with
    candidates.
    """

    def logits(self) -> mx.array:
        return take_rows(self.marginals, self.rows).astype(mx.float32)

    def output_logits(self, queries: mx.array) -> mx.array:
        return self.output.logits(queries, None if self.tokens is None else self.tokens[:, 0])

    def products(self, queries: mx.array, table: nn.Embedding) -> mx.array:
        if self.tokens is None:
            products = table.as_linear(queries)
        else:
            products = queries @ table(self.tokens[:, 0]).swapaxes(-1, -2)
        return products.astype(mx.float32)

    def candidate_products(self, queries: mx.array, table: mx.array) -> mx.array:
        assert self.tokens is not None
        keys = table[take_rows(self.tokens, self.rows)].astype(mx.float32)
        return (keys @ queries.astype(mx.float32)[..., None])[..., 0]


def take_rows(x: mx.array, rows: mx.array) -> mx.array:
    """Return the (batch, n, size) from (batch, D, size): the entries in (batch, n) rows."""
    return mx.take_along_axis(x, rows[..., None], 1)


class ARHead:
    """`treeflash.decoding.interfaces.ARHead` in MLX, for a head of one previous token."""

    def __init__(self, module: ConditionalHead, output: OutputStage) -> None:
        self.module, self.output = module, output

    def transitions(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:
        """Score the rows of all sequences together."""
        slots = Slots.read(self.output, mx.concatenate([block.hidden for block in blocks]))
        batch = len(blocks)
        logits = self.output.logits(slots.normed)
        depths = len(logits) // batch
        noise = None
        if options.noise is not None:
            noise = self.output.noise(options.noise)
        noisy = logits.astype(mx.float32) if noise is None else logits + noise
        marginal = log_softmax(noisy / options.temperature)
        logits, marginal = (x.reshape(batch, depths, -1) for x in (logits, marginal))
        vocab = self._vocab(marginal, options.shortlist)
        if vocab is not None:
            logits, marginal = (mx.take_along_axis(x, vocab, 2) for x in (logits, marginal))
        size = marginal.shape[-1]
        m, k = min(options.m, size), min(options.k, size)
        kept, previous = _scored_rows(marginal[:, :-1], m, options.rows)
        if vocab is not None:
            lists = take_rows(vocab, kept // m) if vocab.shape[1] > 1 else vocab
            previous = mx.take_along_axis(lists, previous[..., None], 2)[..., 0]
        previous = self.output.to_target(previous)
        # Row 0 is the root's; then come the candidates kept of the M at each deeper depth.
        depth = mx.concatenate([mx.zeros((batch, 1), mx.int32), kept // m + 1], 1)
        roots = mx.array([[block.root] for block in blocks], mx.int32)
        last_tokens = mx.concatenate([roots, previous], 1).reshape(-1)
        rows = (depth + depths * mx.arange(batch)[:, None]).reshape(-1)
        queries = self.module.queries(slots, last_tokens, rows).reshape(*depth.shape, -1)
        scores = self.module.score(queries, ScoredTokens(self.output, logits, depth, vocab))
        if noise is not None:
            noise = noise.reshape(batch, depths, -1)
            noise = noise if vocab is None else mx.take_along_axis(noise, vocab, 2)
            scores = scores + take_rows(noise, depth)
        children, log_probs = top_log_probs(scores.reshape(-1, size), k, options.temperature)
        if vocab is not None:
            lists = take_rows(vocab, depth) if vocab.shape[1] > 1 else vocab
            children = mx.take_along_axis(lists, children.reshape(*depth.shape, k), 2)
            log_probs = log_probs + logsumexp(marginal.reshape(-1, size))[rows]
        children = self.output.to_target(children)
        parts = [part.reshape(batch, -1) for part in (m + kept, previous, children, log_probs)]
        confidence = self.module.confidence(slots, last_tokens, rows)
        if confidence is not None:
            parts.append(confidence.reshape(batch, -1))
        places, before, *of_children = read(parts)
        tokens, nats = (x.reshape(batch, -1, k) for x in of_children[:2])
        return RowBatch(places, before, tokens, nats, (depths, m), *of_children[2:]).tables()

    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        slots, rows = Slots.read(self.output, block.hidden), mx.arange(len(block.hidden))
        logits = self.output.logits(slots.normed)
        vocab = self._vocab(logits[None], None)
        queries = self.module.queries(slots, mx.array(previous), rows)
        vocab_logits = logits[None] if vocab is None else mx.take_along_axis(logits[None], vocab, 2)
        scored = ScoredTokens(self.output, vocab_logits, rows[None], vocab)
        log_probs = log_softmax(self.module.score(queries[None], scored)[0])
        if vocab is not None:
            marginal = log_softmax(logits)
            mass = logsumexp(mx.take_along_axis(marginal, vocab[0], 1))
            impossible = mx.full(marginal.shape, -mx.inf)
            log_probs = mx.put_along_axis(impossible, vocab[0], log_probs + mass, 1)
        return np.array(self.output.over_target_vocabulary(log_probs))

    def _vocab(self, marginal: mx.array, shortlist: int | None) -> mx.array | None:
        """Return the tokens that are scored, of the drafter's vocabulary; None for all.

        They are (batch, D, v) candidates of each depth, or (batch, 1, v) tokens of the whole block,
        ascending. `marginal` is (batch, D, Vd), in the order of the marginal probabilities.
        """
        batch, depths, vocab_size = marginal.shape
        if (candidates := self.module.candidates) is not None:
            best = top_indices(marginal.reshape(-1, vocab_size), min(candidates, vocab_size))
            return mx.sort(best.reshape(batch, depths, -1))
        if shortlist is not None and shortlist < vocab_size:
            return mx.sort(top_indices(marginal.max(1), shortlist))[:, None]
        return None


def _scored_rows(marginal: mx.array, m: int, rows: int | None) -> tuple[mx.array, mx.array]:
    """Return (batch, r) ascending indices and previous tokens whose children are scored.

    The indices are into the (D - 1) * m most probable tokens of a sequence, by (batch, D - 1,
    vocab) log probabilities. `rows` of them are kept, the most probable ones; None keeps all.
    """
    batch, depths, vocab = marginal.shape
    if not depths:  # a block of two; MLX before 0.32.4 crashes when it sorts nothing
        return mx.zeros((batch, 0), mx.int32), mx.zeros((batch, 0), mx.int32)
    flat = marginal.reshape(-1, vocab)
    best = top_indices(flat, m)
    weights = mx.take_along_axis(flat, best, 1).reshape(batch, -1)
    kept = mx.sort(mx.argsort(-weights)[:, :rows]).astype(mx.int32)
    return kept, mx.take_along_axis(best.reshape(batch, -1), kept, 1)


TableHead: TypeAlias = ARHead | RecurrentHead
TABLE_HEADS: Mapping[str, Callable[[Any, OutputStage], TableHead]] = {
    "conditional": ARHead,
    "recurrent": RecurrentHead,
}
"""What computes the tables of a head, by `Head.kind`."""
