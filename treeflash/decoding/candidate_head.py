"""The tables of heads that score the candidates of all slots of a block after each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.logit_tables import log_softmax
from treeflash.decoding.output_stage import OutputStage
from treeflash.decoding.transitions import RowBatch, TransitionTable
from treeflash.drafters.heads.lilicorr import Correlation
from treeflash.drafters.heads.operations import Array


class CandidateHead(ABC):
    """A head that scores the best tokens of all slots of a block after each other (LiLiCorr).

    A row's scores are distributed over the candidates, and share the probability that the slot's
    marginal gives to all of them. The scores depend on all slots, so that all are computed even if
    fewer depths are wanted.
    """

    vocab_size: int  # the size of the target's vocabulary

    @abstractmethod
    def candidates(
        self, blocks: Sequence[Any]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
        """Return the (B, D, k) candidates, best first, and their log probabilities and scores.

        The (B, D, k, k) scores are of candidates after the candidates of the slot before; all rows
        of the first slot are those after the root.
        """

    def transitions(self, blocks: Sequence[Any], options: TableOptions) -> list[TransitionTable]:
        depths = len(blocks[0].hidden)
        tokens, log_probs, scores = self.candidates(blocks)
        tokens, log_probs, scores = tokens[:, :depths], log_probs[:, :depths], scores[:, :depths]
        if options.noise is not None:
            noise = options.noise.values(tokens.reshape(-1, tokens.shape[2]))
            scores = scores + noise.reshape(tokens.shape)[:, :, None]
        rows = log_softmax(scores[:, :, : options.m] / np.float32(options.temperature))
        rows = rows + np.log(np.exp(log_probs).sum(-1))[..., None, None]
        order = np.argsort(-rows, axis=-1, kind="stable")[..., : options.k]
        children = np.take_along_axis(np.broadcast_to(tokens[:, :, None], rows.shape), order, -1)
        rows = np.take_along_axis(rows, order, -1)
        count, _, m, k = rows.shape
        places = np.arange(m, depths * m, dtype=np.int32)
        scored = np.append(0, places)  # the root's row, and the rows of the other depths
        return RowBatch(
            np.tile(places, (count, 1)),
            tokens[:, :-1, :m].reshape(count, -1),
            children.reshape(count, depths * m, k)[:, scored],
            rows.reshape(count, depths * m, k)[:, scored],
            (depths, m),
        ).tables()

    def log_probs(self, block: Any, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the (D, vocab) after (D,) previous tokens; -inf for all but the candidates."""
        depths = len(block.hidden)
        (tokens,), (log_probs,), (scores,) = self.candidates([block])
        tokens, log_probs, scores = tokens[:depths], log_probs[:depths], scores[:depths]
        rows = log_softmax(scores) + np.log(np.exp(log_probs).sum(-1))[:, None, None]
        wide = np.full((depths, self.vocab_size), -np.inf, np.float32)
        for depth, row in enumerate(rows):
            places = np.flatnonzero(tokens[depth - 1] == previous[depth]) if depth else [0]
            if len(places):  # nothing is scored after other tokens
                wide[depth, tokens[depth]] = row[places[0]]
        return wide


class CorrelationHead(CandidateHead):
    """The candidates of LiLiCorr's head, written once for PyTorch and MLX.

    Args:
        module: the backend's module of the head.
        output: the backend's output stage of the drafter.
    """

    def __init__(self, module: Correlation, output: OutputStage) -> None:
        self.module, self.output, self.ops = module, output, output.ops
        self.vocab_size = output.target.vocab_size

    def candidates(
        self, blocks: Sequence[Any]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
        first = self.output.config.first_slot
        hidden = self.ops.stack([block.slots[first:] for block in blocks], 0)
        anchors = self.ops.stack([block.anchor for block in blocks], 0)
        tokens, log_probs, scores = self.read(hidden, anchors)
        shape = *hidden.shape[:2], -1
        tokens, log_probs = tokens.reshape(shape), log_probs.reshape(shape)
        return tokens, log_probs, scores.reshape(*tokens.shape, -1)

    def read(self, hidden: Array, anchors: Array) -> list[NDArray[Any]]:
        """Read what `score` computes."""
        return self.ops.read(self.score(hidden, anchors))

    def score(self, hidden: Array, anchors: Array) -> list[Array]:
        """Return the (B, size) candidates, log probabilities and scores of B blocks.

        They come from (B, D, hidden_size) outputs of the drafter's last layer, and the (B,
        hidden_size) features of the last committed positions.
        """
        (blocks, depths, _), output = hidden.shape, self.output
        normed = output.norm(hidden)
        logits = output.logits(normed.reshape(blocks * depths, -1))
        tokens, log_probs = self.ops.top_log_probs(logits, output.config.selector_top_k, 1.0)
        tokens, log_probs = (x.reshape(blocks, depths, -1) for x in (tokens, log_probs))
        scores = self.module.forward(output.embed(tokens), normed, log_probs, anchors)
        return [x.reshape(blocks, -1) for x in (tokens, log_probs, scores)]
