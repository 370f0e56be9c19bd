"""Metrics of a drafter on held-out texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from treeflash.training.config import TrainConfig
from treeflash.training.interfaces import Response
from treeflash_cuda.target import Target
from treeflash_cuda.training.batch import Batch
from treeflash_cuda.training.batches import choose_anchors, make_batch
from treeflash_cuda.training.features import FeatureStore
from treeflash_cuda.training.losses import Outcomes, forward_kl

ANCHORS = 16
"""Anchors per text."""


class Validation:
    """Held-out texts, always with the same anchors."""

    def __init__(
        self,
        target: Target,
        layer_ids: Sequence[int],
        texts: Sequence[Response],
        depths: int,
        config: TrainConfig,
    ) -> None:
        """Run the target on the texts once; its features are kept on the CPU."""
        self.device = target.device
        self.batches: list[Batch] = []
        random = np.random.default_rng(config.seed)
        texts = sorted(texts, key=len)
        store = FeatureStore(target, layer_ids, texts, config.top_tokens, None, 0)
        for first in range(0, len(texts), config.sequences):
            part = range(len(texts))[first : first + config.sequences]
            batch = make_batch(
                [texts[n] for n in part],
                store.get(part),
                [choose_anchors(texts[n], ANCHORS, random) for n in part],
                depths,
            )
            self.batches.append(batch.pin() if self.device.type == "cuda" else batch)

    @torch.no_grad()
    def measure(self, blocks: nn.Module) -> dict[str, Any]:
        """The metrics of the drafter.

        Returns:
            For `marginal` and, with a head, `corrected`: `kl_*`, the mean KL divergence in nats by
            depth; `acceptance_*`, the mean overlap of the distributions by depth; `top1_*`, how
            often the top token is the text's, by depth; `chain_*`, the block efficiency of the
            chain of top tokens.
        """
        sums: dict[str, Tensor] = {}
        anchors = 0
        for batch in (batch.to(self.device) for batch in self.batches):
            rows = batch.target_rows()
            marginal, corrected = blocks(batch, rows.wanted())
            anchors += int(batch.valid.any(2).sum())
            for name, prediction in (("marginal", marginal), ("corrected", corrected)):
                if prediction is None:
                    continue
                outcomes = Outcomes.of(rows, prediction.log_probs)
                measured = {
                    f"kl_{name}": forward_kl(outcomes),
                    f"acceptance_{name}": outcomes.acceptance(),
                    f"top1_{name}": (outcomes.log_next >= prediction.best).float(),
                }
                for key, value in measured.items():
                    table = torch.zeros(batch.valid.shape, device=value.device)
                    table[batch.valid] = value
                    sums[key] = sums.get(key, torch.zeros(())) + table.sum((0, 1)).cpu()
                    if key.startswith("top1"):
                        accepted = table.cumprod(2).sum()
                        chain = f"chain_{name}"
                        sums[chain] = sums.get(chain, torch.zeros(())) + accepted.cpu()
            count = batch.valid.sum((0, 1)).cpu()
            sums["count"] = sums.get("count", torch.zeros(())) + count
        counts = sums.pop("count").clamp(min=1)
        return {
            name: 1 + float(value) / max(anchors, 1)
            if name.startswith("chain")
            else [round(float(v), 4) for v in value / counts]
            for name, value in sums.items()
        }
