"""The conditional head: a block's tables, from the scores of whichever head the drafter has."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from treeflash.decoding.gumbel import Noise
from treeflash.decoding.transitions import TransitionTable
from treeflash_mlx.drafter import Block, drafted
from treeflash_mlx.drafter_model import DrafterModel
from treeflash_mlx.output_stage import OutputStage
from treeflash_mlx.scores import of_rows, scores_of
from treeflash_mlx.target import Target
from treeflash_mlx.topk import log_softmax, logsumexp, top_indices, top_log_probs


class ARHead:
    """`treeflash.decoding.interfaces.ARHead` in MLX."""

    def __init__(self, module: nn.Module, model: DrafterModel, target: Target) -> None:
        """Use the weights of a head with those of its drafter and target."""
        self.module = module
        self.model = model
        self.output = OutputStage(model.config, model.own, target)
        self.scores = scores_of(module, model, self.output)

    def transitions(
        self,
        blocks: Sequence[Block],
        m: int,
        k: int,
        temperature: float,
        *,
        noise: Noise | None = None,
        shortlist: int | None = None,
        rows: int | None = None,
    ) -> list[TransitionTable]:
        """See `ARHead.transitions`; all texts are computed together."""
        texts, hidden = len(blocks), drafted(blocks)
        depths = len(hidden) // texts
        normed = self.model.norm(hidden)
        logits = self.output.logits(normed)
        added = None if noise is None else self.output.noise(noise)
        noisy = logits.astype(mx.float32) if added is None else logits + added
        marginal = log_softmax(noisy / temperature)
        logits, marginal = (x.reshape(texts, depths, -1) for x in (logits, marginal))
        vocab = self._vocab(marginal, shortlist)
        if vocab is not None:
            marginal = mx.take_along_axis(marginal, vocab, 2)
        size = marginal.shape[-1]
        m, k = min(m, size), min(k, size)
        kept, previous = _scored_rows(marginal[:, :-1], m, rows)
        if vocab is not None:
            lists = of_rows(vocab, kept // m) if vocab.shape[1] > 1 else vocab
            previous = mx.take_along_axis(lists, previous[..., None], 2)[..., 0]
        previous = self.output.to_target(previous)
        # Of the D * M rows: the root's, and those kept of the M at each further depth.
        depth = mx.concatenate([mx.zeros((texts, 1), mx.int32), kept // m + 1], 1)
        roots = mx.array([[block.root] for block in blocks], mx.int32)
        after = mx.concatenate([roots, previous], 1).reshape(-1)
        index = (depth + depths * mx.arange(texts)[:, None]).reshape(-1)
        queries = self.scores.queries(hidden, normed, after, index).reshape(*depth.shape, -1)
        scores = self.scores.score(queries, logits, depth, vocab)
        if added is not None:
            added = added.reshape(logits.shape)
            added = added if vocab is None else mx.take_along_axis(added, vocab, 2)
            scores = scores + of_rows(added, depth)
        children, log_probs = top_log_probs(scores.reshape(-1, size), k, temperature)
        if vocab is not None:
            lists = of_rows(vocab, depth) if vocab.shape[1] > 1 else vocab
            children = mx.take_along_axis(lists, children.reshape(*depth.shape, k), 2)
            log_probs = log_probs + logsumexp(marginal.reshape(-1, size))[index]
        children = self.output.to_target(children)
        # Token ids are exact in float32, and one array needs one read from the device.
        parts = [part.reshape(texts, -1) for part in (m + kept, previous, children, log_probs)]
        confidence = self.scores.confidence(normed, after, index)
        if confidence is not None:
            parts.append(confidence.reshape(texts, -1))
        read = np.array(mx.concatenate([part.astype(mx.float32) for part in parts], 1))
        sizes = np.cumsum([part.shape[1] for part in parts[:-1]])
        tables = []
        for numbers in read:
            places, previous_, tokens, log_probs_, *confidences = np.split(numbers, sizes)
            tables.append(
                TransitionTable.from_rows(
                    places.astype(np.int32),
                    previous_.astype(np.int32),
                    tokens.astype(np.int32).reshape(-1, k),
                    log_probs_.reshape(-1, k),
                    (depths, m),
                    *confidences,
                )
            )
        return tables

    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `ARHead.log_probs`."""
        hidden, rows = block.hidden, mx.arange(len(block.hidden))
        normed = self.model.norm(hidden)
        logits = self.output.logits(normed)
        queries = self.scores.queries(hidden, normed, mx.array(previous), rows)
        vocab = self._vocab(logits[None], None)
        scores = self.scores.score(queries[None], logits[None], rows[None], vocab)
        log_probs = log_softmax(scores[0])
        if vocab is not None:
            marginal = log_softmax(logits)
            mass = logsumexp(mx.take_along_axis(marginal, vocab[0], 1))
            nothing = mx.full(marginal.shape, -mx.inf)
            log_probs = mx.put_along_axis(nothing, vocab[0], log_probs + mass, 1)
        return np.array(self.output.over_target_vocabulary(log_probs))

    def _vocab(self, marginal: mx.array, shortlist: int | None) -> mx.array | None:
        """The tokens that are scored, of the drafter's vocabulary.

        Args:
            marginal: (texts, D, Vd), in the order of the marginal probabilities.
            shortlist: as in `transitions`.

        Returns:
            (texts, D, v) candidates of each depth, or (texts, 1, v) of the text, ascending; None
            for all.
        """
        texts, depths, vocab_size = marginal.shape
        if (candidates := self.scores.candidates) is not None:
            best = top_indices(marginal.reshape(-1, vocab_size), min(candidates, vocab_size))
            return mx.sort(best.reshape(texts, depths, -1))
        if shortlist is not None and shortlist < vocab_size:
            return mx.sort(top_indices(marginal.max(1), shortlist))[:, None]
        return None


def _scored_rows(marginal: mx.array, m: int, rows: int | None) -> tuple[mx.array, mx.array]:
    """The previous tokens whose children are scored.

    Args:
        marginal: (texts, D - 1, vocab) log probabilities.
        m: the tokens of each depth to choose from.
        rows: how many of each text to keep, those of the highest log probability; None keeps all.

    Returns:
        (texts, r) indices into the (D - 1) * m tokens of a text, ascending, and (texts, r) the
        tokens.
    """
    texts, depths, vocab = marginal.shape
    if not depths:  # a block of two; MLX before 0.32.4 crashes when it sorts nothing
        return mx.zeros((texts, 0), mx.int32), mx.zeros((texts, 0), mx.int32)
    flat = marginal.reshape(-1, vocab)
    best = top_indices(flat, m)
    weights = mx.take_along_axis(flat, best, 1).reshape(texts, -1)
    kept = mx.sort(mx.argsort(-weights)[:, :rows]).astype(mx.int32)
    return kept, mx.take_along_axis(best.reshape(texts, -1), kept, 1)
