"""A small training run: its settings, and a target whose samples a drafter can predict."""

from __future__ import annotations

from pathlib import Path

from byte_tokens import SPECIAL, save_tokenizer

from treeflash.drafters.folder import read_config, read_tensors
from treeflash.testing.models import edit_config, save, write_target

VOCAB = len(SPECIAL) + 256
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


def write_predictable_target(folder: Path, family: str) -> Path:
    """Write a random target that never ends a text, with a sharpened distribution."""
    write_target(folder, family, seed=3, vocab_size=VOCAB)
    edit_config(folder, lambda config: config.pop("eos_token_id"))
    tensors = read_tensors(folder)
    tensors["lm_head.weight"] *= 6
    save(folder, read_config(folder), tensors)
    return save_tokenizer(folder)
