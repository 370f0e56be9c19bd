"""Small training runs: settings, texts, and a target whose samples a drafter can predict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from byte_tokens import SPECIAL, save_tokenizer

from treeflash.config import LoadConfig
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.testing.models import edit_config, save, write_target
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response

VOCAB = len(SPECIAL) + 256
CPU = LoadConfig(device="cpu", dtype="float32")
ON_CPU = ["--backend", "cuda", "--device", "cpu", "--dtype", "float32"]
SMALL = """\
layers = 2
block_size = 6
head_size = 64
top_tokens = 8
sequences = 4
anchors = 16
learning_rate = 4e-3
validation_sequences = 4
gamma = 4.0
"""
TINY_VOCAB = 40
TINY_RUN = TrainConfig(layers=2, block_size=5, top_tokens=8, sequences=2, anchors=8)
"""For a target of `TINY_VOCAB` tokens; tests add how long they train, and what they save."""


def random_texts(count: int = 8, vocab_size: int = TINY_VOCAB) -> list[Response]:
    """Answers of 15 random tokens to prompts of 5."""
    ids = np.random.default_rng(2).integers(0, vocab_size, (count, 20)).tolist()
    return [Response(prompt_ids=tuple(row[:5]), response_ids=tuple(row[5:])) for row in ids]


def write_predictable_target(folder: Path, family: str) -> Path:
    """Write a random target that never ends a text, with a sharpened distribution."""
    write_target(folder, family, seed=3, vocab_size=VOCAB)
    edit_config(folder, lambda config: config.pop("eos_token_id"))
    tensors = read_tensors(folder)
    tensors["lm_head.weight"] *= 6
    save(folder, read_config(folder), tensors)
    return save_tokenizer(folder)
