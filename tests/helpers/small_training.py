"""Small training runs: settings, texts, and a target whose samples a drafter can predict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
TINY_RUN = TrainConfig(
    layers=2,
    block_size=5,
    head_size=48,
    top_tokens=8,
    sequences=2,
    anchors=8,
    learning_rate=3e-3,
    steps=6,
    validation_sequences=1,
    validate_every=2,
    save_every=2,
)


def texts_of(*lengths: tuple[int, int], vocab_size: int = TINY_VOCAB) -> list[Response]:
    """Make random answers to random prompts; a pair of lengths is a prompt's and its answer's."""
    rows = np.random.default_rng(2)
    ids = [rows.integers(0, vocab_size, sum(pair)).tolist() for pair in lengths]
    return [
        Response(prompt_ids=tuple(row[:prompt]), response_ids=tuple(row[prompt:]))
        for row, (prompt, _) in zip(ids, lengths, strict=True)
    ]


def tensors(folder: Path) -> dict[str, Any]:
    """Read the tensors of a drafter by the names that they have inside the model."""
    return {name.removeprefix("model."): x for name, x in read_tensors(folder).items()}


def train_steps(
    target: Path,
    output: Path,
    texts: Sequence[Response] | None = None,
    *,
    held_out: Sequence[Response] = (),
    load: LoadConfig = CPU,
    stop: int | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Train a drafter with what differs from `TINY_RUN`; return the records of its steps.

    The texts are eight random ones unless given. After `stop` steps the run is interrupted.
    """
    from treeflash_cuda.training.entry import train

    texts = texts_of(*[(5, 15)] * 8) if texts is None else texts
    records = []
    for record in train(target, texts, output, replace(TINY_RUN, **changes), load, held_out):
        if "step" in record:
            records.append(record)
        if len(records) == stop:
            break
    return records


def write_prompts(path: Path, prompts: Iterable[str]) -> Path:
    """Write a file of prompts, whose ids are their numbers."""
    rows = ({"id": n, "prompt": prompt} for n, prompt in enumerate(prompts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_predictable_target(folder: Path, family: str) -> Path:
    """Write a random target that never ends a text, with a sharpened distribution."""
    write_target(folder, family, seed=3, vocab_size=VOCAB)
    edit_config(folder, lambda config: config.pop("eos_token_id"))
    tensors = read_tensors(folder)
    tensors["lm_head.weight"] *= 6
    save(folder, read_config(folder), tensors)
    return save_tokenizer(folder)
