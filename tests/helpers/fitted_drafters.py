"""Drafters that know a few texts, so that long paths of their drafts are accepted.

They are fitted to the very texts that tests then decode. Their block efficiency says nothing of
drafters: it shows that right drafts are accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from treeflash_cuda.drafter_loading import dequantise, read_tensors
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.heads import HEAD_CLASSES
from treeflash_cuda.training.data import SequenceFeatures, make_batch
from treeflash_cuda.training.losses import objective
from treeflash_cuda.training.model import Blocks

from treeflash.drafters.folder import read_config
from treeflash.drafters.loading import read_layout
from treeflash.testing.models import save
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response

CONFIG = TrainConfig(loss="ce", top_tokens=1)
LEARNING_RATE = 4e-3
LOSS = 1.2
"""Nats of a token without the one before it: right often enough, and wrong often enough that trees
are more than chains."""
MOST_STEPS = 300


def fit_drafter(
    folder: Path,
    texts: Sequence[Response],
    features: Sequence[NDArray[np.float32]],
    embeddings: NDArray[np.float32],
    lm_head: NDArray[np.float32],
    *,
    layers: int,
) -> None:
    """Fit the drafter in a folder to texts until its loss is `LOSS`.

    It is PyTorch that fits, whatever backend runs the target.

    Args:
        folder: as `write_drafter` wrote it, with a head; replaced by the fitted one.
        texts: to continue from every position of their responses.
        features: (length, features) outputs of the target's layers that the drafter reads.
        embeddings: (vocab, hidden_size) of the target.
        lm_head: (vocab, hidden_size) of the target.
        layers: of the target.
    """
    vocab_size, hidden_size = embeddings.shape
    layout = read_layout(
        folder, hidden_size=hidden_size, vocab_size=vocab_size, num_hidden_layers=layers
    )
    tensors = layout.read(read_tensors, dequantise, torch.stack)
    model = DrafterModel(tensors.config)
    model.load_state_dict(tensors.backbone)
    head = HEAD_CLASSES[tensors.config.head](tensors.config, tensors.head_size, vocab_size)
    head.load_state_dict(tensors.head)
    output: Any = SimpleNamespace(weight=torch.tensor(lm_head))
    blocks = Blocks(model, head, torch.tensor(embeddings), output)
    rows = [
        SequenceFeatures(
            torch.tensor(of),
            torch.tensor(text.response_ids)[:, None],
            torch.zeros(len(text.response_ids), 1),
        )
        for text, of in zip(texts, features, strict=True)
    ]
    roots = [np.arange(len(text.prompt_ids), len(text) - 1) for text in texts]
    batch = make_batch(texts, rows, roots, tensors.config.depths)
    optimizer = torch.optim.Adam(blocks.parameters(), LEARNING_RATE)
    for _ in range(MOST_STEPS):
        loss, parts = objective(blocks, batch, vocab_size, CONFIG, torch.Generator())
        if parts["marginal"] < LOSS:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    else:
        raise AssertionError(f"the drafter has not learned the texts: {parts}")
    fitted = {name: tensor.numpy() for name, tensor in blocks.state_dict().items()}
    save(folder, read_config(folder), fitted)
