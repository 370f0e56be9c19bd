"""Which texts and which anchors train when: a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from treeflash.training.config import TrainConfig
from treeflash.training.interfaces import Response
from treeflash_cuda.training.blocks import GROUP, Batch
from treeflash_cuda.training.features import FeatureStore, TextFeatures

BATCHES_BETWEEN_SORTS = 16
"""Batches of texts that are sorted by length together: enough to be padded little."""


@dataclass(frozen=True)
class Plan:
    """The texts of every forward of a run.

    Attributes:
        lengths: of the texts, in tokens.
        batch: texts of a forward, of all processes together.
        seed: of shuffling.
    """

    lengths: Sequence[int]
    batch: int
    seed: int

    def __getitem__(self, forward: int) -> NDArray[np.int64]:
        """(batch,) numbers of texts; forwards count from 0 through all epochs."""
        # Each epoch drops its incomplete last batch, whose texts an epoch later are others.
        an_epoch = max(1, len(self.lengths) // self.batch)
        epoch, index = divmod(forward, an_epoch)
        return self._epoch(epoch)[index]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """(forwards, batch): shuffled texts, similar lengths together."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))
        if len(order) < self.batch:
            return np.resize(order, (1, self.batch))
        order = order[: len(order) // self.batch * self.batch]
        window = BATCHES_BETWEEN_SORTS * self.batch
        lengths = np.asarray(self.lengths)
        parts = [order[i : i + window] for i in range(0, len(order), window)]
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        return random.permutation(order.reshape(-1, self.batch))


def choose_anchors(text: Response, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Up to `count` positions of the response, in order, each with a token after it."""
    first, end = len(text.prompt_ids), len(text) - 1
    positions = np.arange(first, end)
    if len(positions) > count:
        positions = np.sort(random.choice(positions, count, replace=False))
    return positions


def make_batch(
    texts: Sequence[Response],
    features: Sequence[TextFeatures],
    anchors: Sequence[NDArray[np.int64]],
    block_size: int,
) -> Batch:
    """Pad texts to one length, and anchors to one number; padding has nothing to predict.

    The batch is on the CPU.
    """
    length, most = max(map(len, texts)), -(-max(map(len, anchors)) // GROUP) * GROUP
    rows, k = len(texts), features[0].top_tokens.shape[1]
    width = features[0].features.shape[1]
    tokens = torch.zeros(rows, length, dtype=torch.long)
    context = torch.zeros(rows, length, width, dtype=features[0].features.dtype)
    top_tokens = torch.zeros(rows, length, k, dtype=torch.long)
    top_log_probs = torch.zeros(rows, length, k)
    places = torch.zeros(rows, most, dtype=torch.long)
    ends = torch.zeros(rows, most, dtype=torch.long)
    for row, (text, part, chosen) in enumerate(zip(texts, features, anchors, strict=True)):
        first, end = len(text.prompt_ids) - 1, len(text) - 1
        tokens[row, : len(text)] = torch.tensor(text.token_ids)
        context[row, : len(text)] = part.features
        top_tokens[row, first:end] = part.top_tokens
        top_log_probs[row, first:end] = part.top_log_probs.float()
        places[row, : len(chosen)] = torch.from_numpy(chosen)
        ends[row, : len(chosen)] = end
    depth = torch.arange(1, block_size)
    valid = places[:, :, None] + depth <= ends[:, :, None]
    return Batch(tokens, context, places, valid, top_tokens, top_log_probs)


class Batches:
    """The batches of one process of a run, by the number of the forward."""

    def __init__(
        self,
        store: FeatureStore,
        config: TrainConfig,
        block_size: int,
        process: int,
        processes: int,
    ) -> None:
        """Plan the run."""
        self.store = store
        self.config = config
        self.block_size = block_size
        self.process = process
        self.plan = Plan(
            [len(text) for text in store.texts], config.sequences * processes, config.seed
        )

    def __getitem__(self, forward: int) -> Batch:
        """The batch of a forward, counted from 0 through all epochs."""
        first = self.process * self.config.sequences
        numbers = self.plan[forward][first : first + self.config.sequences].tolist()
        texts = [self.store.texts[n] for n in numbers]
        random = np.random.default_rng((self.config.seed, forward, self.process))
        return make_batch(
            texts,
            self.store.get(numbers),
            [choose_anchors(text, self.config.anchors, random) for text in texts],
            self.block_size,
        ).to(self.store.target.device)
