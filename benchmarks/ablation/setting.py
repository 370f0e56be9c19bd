"""What the cells share: a target, its answers, and prompts to measure on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.ablation.cells import Data
from treeflash.config import LoadConfig, SamplingConfig
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.testing.models import save, write_target
from treeflash.text.prompt import encode
from treeflash.text.prompt_file import read_rows
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.interfaces import Request, Response
from treeflash.training.responses import read_responses
from treeflash.training.trainers import trainer

VOCAB, PROMPT_TOKENS, SLOTS = 256, 8, 64
SHARPNESS = 6.0
"""Factor on the output head of the random target, so that its next token can be predicted."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the cells share.

    Attributes:
        target: its folder.
        greedy: answers at temperature 0.
        sampled: answers at temperature 1, to other prompts.
        prompts: token ids of prompts that no answer belongs to.
    """

    target: Path
    greedy: list[Response]
    sampled: list[Response]
    prompts: list[list[int]]

    def answers(self, data: Data) -> list[Response]:
        """The answers that a cell trains on."""
        share = {"half": 2, "quarter": 4}.get(data, 1)
        found = {"greedy": self.greedy, "sampled": self.sampled}
        if data in found:
            return found[data]
        return [r for kind in found.values() for r in kind[: len(kind) // share]]


def random_setting(
    folder: Path, load: LoadConfig, *, answers: int, tokens: int, prompts: int
) -> Setting:
    """A small target of random weights that answers random prompts.

    Args:
        folder: for the target.
        load: where and how it runs.
        answers: how many, half of them greedy.
        tokens: of an answer.
        prompts: to measure on.
    """
    write_target(folder, "llama", seed=3, vocab_size=VOCAB, hidden_size=64, layers=6)
    tensors = read_tensors(folder)
    tensors["lm_head.weight"] *= SHARPNESS
    save(folder, read_config(folder), tensors)
    random = np.random.default_rng(1)
    ids = random.integers(2, VOCAB, (answers + prompts, PROMPT_TOKENS)).tolist()
    requests = [
        Request(
            prompt_ids=tuple(row),
            sampling=SamplingConfig(temperature=float(n % 2), seed=n),
            max_tokens=tokens,
        )
        for n, row in enumerate(ids[:answers])
    ]
    texts = dict(trainer("cuda").responder(folder, load).respond(requests, frozenset(), SLOTS))
    responses = [
        Response(prompt_ids=request.prompt_ids, response_ids=tuple(texts[n]))
        for n, request in enumerate(requests)
    ]
    return Setting(
        target=folder, greedy=responses[::2], sampled=responses[1::2], prompts=ids[answers:]
    )


def read_setting(target: Path, greedy: Path, sampled: Path, prompts: Path, limit: int) -> Setting:
    """A target, files of `treeflash.distill`, and the first prompts of a file."""
    tokenizer = Tokenizer.from_folder(target)
    return Setting(
        target=target,
        greedy=read_responses(greedy, tokenizer),
        sampled=read_responses(sampled, tokenizer),
        prompts=[encode(tokenizer, row.turns[0]) for row in read_rows(prompts)[:limit]],
    )
