"""The texts and anchors of each forward pass: a function of the seed and its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.training.config import TrainConfig
from treeflash.training.interfaces import Response
from treeflash_cuda.training.batch import Batch
from treeflash_cuda.training.block_attention import GROUP
from treeflash_cuda.training.features import FeatureStore, TextFeatures

BATCHES_PER_SORT = 16
"""Texts are sorted by length within this many batches: enough to keep padding small."""


@dataclass(frozen=True)
class Plan:
    """The texts of every forward pass of a run.

    Attributes:
        lengths: lengths of the texts in tokens.
        batch: texts per forward pass, over all processes.
        seed: of the shuffles.
    """

    lengths: Sequence[int]
    batch: int
    seed: int

    def __getitem__(self, forward: int) -> NDArray[np.int64]:
        """(batch,) numbers of the texts; forward passes count from 0 through all epochs."""
        # Each epoch drops its incomplete last batch, which has other texts in every epoch.
        per_epoch = max(1, len(self.lengths) // self.batch)
        epoch, index = divmod(forward, per_epoch)
        return self._epoch(epoch)[index]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """(forward passes, batch): shuffled texts, similar lengths together."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))
        if len(order) < self.batch:
            return np.resize(order, (1, self.batch))
        order = order[: len(order) // self.batch * self.batch]
        window = BATCHES_PER_SORT * self.batch
        lengths = np.asarray(self.lengths)
        parts = [order[i : i + window] for i in range(0, len(order), window)]
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        return random.permutation(order.reshape(-1, self.batch))


def choose_anchors(text: Response, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Up to `count` positions of the response in ascending order, each with a token after it."""
    first, end = len(text.prompt_ids), len(text) - 1
    positions = np.arange(first, end)
    if len(positions) > count:
        positions = np.sort(random.choice(positions, count, replace=False))
    return positions


def make_batch(
    texts: Sequence[Response],
    features: Sequence[TextFeatures],
    anchors: Sequence[NDArray[np.int64]],
    depths: int,
    device: torch.device | None = None,
) -> Batch:
    """Pad the texts to one length and the anchors to one number; padding predicts nothing.

    Args:
        texts: the rows.
        features: of the texts, on any device.
        anchors: of the texts.
        depths: D, tokens that a block predicts.
        device: of the batch; None is the CPU.
    """
    length, count = max(map(len, texts)), -(-max(map(len, anchors)) // GROUP) * GROUP
    rows, k = len(texts), features[0].top_tokens.shape[1]
    width = features[0].features.shape[1]
    tokens = torch.zeros(rows, length, dtype=torch.long)
    # What is large is copied text by text to where it is needed.
    context = torch.zeros(rows, length, width, dtype=features[0].features.dtype, device=device)
    top_tokens = torch.zeros(rows, length, k, dtype=torch.long, device=device)
    top_log_probs = torch.zeros(rows, length, k, device=device)
    positions = torch.zeros(rows, count, dtype=torch.long)
    ends = torch.zeros(rows, count, dtype=torch.long)
    for row, (text, part, chosen) in enumerate(zip(texts, features, anchors, strict=True)):
        first, end = len(text.prompt_ids) - 1, len(text) - 1
        tokens[row, : len(text)] = torch.tensor(text.token_ids)
        context[row, : len(text)] = _copyable(part.features, context)
        top_tokens[row, first:end] = part.top_tokens
        top_log_probs[row, first:end] = part.top_log_probs
        positions[row, : len(chosen)] = torch.from_numpy(chosen)
        ends[row, : len(chosen)] = end
    depth = torch.arange(1, depths + 1)
    valid = positions[:, :, None] + depth <= ends[:, :, None]
    small = (tensor.to(device) for tensor in (positions, valid))
    return Batch(tokens.to(device), context, *small, top_tokens, top_log_probs)


def _copyable(source: Tensor, destination: Tensor) -> Tensor:
    """The source in pinned memory if it is to be copied to a GPU: pageable copies are slow."""
    crosses = destination.device.type == "cuda" and source.device.type == "cpu"
    return source.pin_memory() if crosses else source


class Batches:
    """The batches of one process, by the number of the forward pass."""

    def __init__(
        self,
        store: FeatureStore,
        config: TrainConfig,
        depths: int,
        process: int,
        processes: int,
    ) -> None:
        """Plan the run."""
        self.store = store
        self.config = config
        self.depths = depths
        self.process = process
        self.plan = Plan(
            [len(text) for text in store.texts], config.sequences * processes, config.seed
        )

    def __getitem__(self, forward: int) -> Batch:
        """The batch of a forward pass, counted from 0 through all epochs."""
        first = self.process * self.config.sequences
        numbers = self.plan[forward][first : first + self.config.sequences].tolist()
        texts = [self.store.texts[n] for n in numbers]
        random = np.random.default_rng((self.config.seed, forward, self.process))
        return make_batch(
            texts,
            self.store.get(numbers),
            [choose_anchors(text, self.config.anchors, random) for text in texts],
            self.depths,
            self.store.target.device,
        )
