"""Whether rounding explains an answer that is not the Python API's.

Float32 sums in another order, as beside other texts, change logits a little. Where the best two,
with their noise if they are sampled, are nearer to each other than that, either token is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving.servers import Job
from treeflash import LanguageModel
from treeflash.config import SamplingConfig
from treeflash.decoding.gumbel import position_keys
from treeflash.decoding.sampling import noisy_logits
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.text.tokenizer import REPLACEMENT


@dataclass(frozen=True)
class Judge:
    """Compares answers with the Python API's.

    Attributes:
        model: the loaded pair, in float32.
        rounding: the largest difference between logits of a text's tokens computed one by one and
            all at once, nats.
    """

    model: LanguageModel
    rounding: float = 0.0

    @classmethod
    def of(cls, model: LanguageModel, jobs: Sequence[Job]) -> Judge:
        """Measure the rounding with the texts of these jobs."""
        exact = cls(model)
        return cls(model, max(exact._rounding(job) for job in jobs))

    def near_ties(self, job: Job, text: str, tokens: int) -> list[float] | None:
        """The margins of the near-ties at which an answer took the other token.

        After each of them the answer must go on as the Python API's does.

        Args:
            job: that was to be done.
            text: of the answer.
            tokens: of the answer.

        Returns:
            In order, nats; empty if the answer is the Python API's; None if
            near-ties do not explain it.
        """
        prompt, sampling = self._prompt(job), self._sampling(job)
        pending: list[tuple[list[int], list[float]]] = [([], [])]
        while pending:
            begun, margins = pending.pop()
            found = self._continue(job, prompt, begun)
            if (self.model.tokenizer.decode(found), len(found)) == (text, tokens):
                return margins
            positions = np.arange(len(prompt), len(prompt) + len(found), dtype=np.int32)
            rows = one_by_one(self.model, prompt, found)
            near = near_best(rows, sampling, positions, self.rounding)
            for i in range(len(begun), len(found)):
                for token, margin in near[i].items():
                    other = [*found[:i], token]
                    if token != found[i] and self._begins(text, other):
                        pending.append((other, [*margins, margin]))
                if not self._begins(text, found[: i + 1]):
                    break
        return None

    def _rounding(self, job: Job) -> float:
        prompt = self._prompt(job)
        tokens = self._continue(job, prompt, [])
        alone, together = (rows(self.model, prompt, tokens) for rows in (one_by_one, at_once))
        return float(abs(alone - together).max())

    def _prompt(self, job: Job) -> list[int]:
        return self.model.tokenizer.chat([{"role": "user", "content": job.question}])

    def _sampling(self, job: Job) -> SamplingConfig:
        return self.model.decode_config(job.options).sampling

    def _continue(self, job: Job, prompt: list[int], begun: list[int]) -> list[int]:
        """The tokens of the Python API's answer that begins so."""
        room = job.max_tokens - len(begun)
        if not room or (begun and begun[-1] in self.model.tokenizer.stop_token_ids):
            return begun
        options = {**job.options, "max_tokens": room}
        return begun + self.model.generate([*prompt, *begun], **options).token_ids

    def _begins(self, text: str, tokens: list[int]) -> bool:
        return text.startswith(self.model.tokenizer.decode(tokens).rstrip(REPLACEMENT))


def near_best(
    logits: NDArray[np.float32],
    sampling: SamplingConfig,
    positions: NDArray[np.int32],
    rounding: float,
) -> list[dict[int, float]]:
    """The tokens that may be chosen at n positions, and how far each is from the best one.

    Args:
        logits: (n, vocab).
        sampling: temperature and filters.
        positions: (n,) of the tokens.
        rounding: each of two logits may be wrong by it.
    """
    if sampling.greedy:
        scores: NDArray[Any] = logits
    else:
        scores = noisy_logits(logits, sampling, position_keys(sampling.seed, positions))
    behind = scores.max(-1, keepdims=True) - scores
    return [
        {int(token): float(row[token]) for token in np.flatnonzero(row <= 2 * rounding)}
        for row in behind
    ]


def one_by_one(
    model: LanguageModel, prompt: Sequence[int], tokens: Sequence[int]
) -> NDArray[np.float32]:
    """(n, vocab) the logits of n tokens after a prompt, each by a forward pass of its own."""
    with TextSession(model.backend, capacity=len(prompt) + len(tokens)) as session:
        session.extend(prompt[:-1])
        rows = []
        for root in [prompt[-1], *tokens[:-1]]:
            rows.append(session.logits(DraftTree.root_only(root)))
            session.commit(np.zeros(1, np.int32))
    return np.concatenate(rows)


def at_once(
    model: LanguageModel, prompt: Sequence[int], tokens: Sequence[int]
) -> NDArray[np.float32]:
    """(n, vocab) the logits of n tokens after a prompt, by one forward pass."""
    roots = np.array([prompt[-1], *tokens[:-1]], np.int32)
    chain = DraftTree.from_parents(roots, np.arange(-1, len(roots) - 1, dtype=np.int32))
    with TextSession(model.backend, capacity=len(prompt) + len(tokens)) as session:
        session.extend(prompt[:-1])
        return session.logits(chain)
