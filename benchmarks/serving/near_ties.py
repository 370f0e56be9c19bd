"""Near-ties: whether rounding explains an answer of the server that is not the Python API's answer.

Float32 sums in another order, as beside other sequences, change logits a little. Where the best two
logits, with their noise if tokens are sampled, are nearer to each other than this rounding, either
token is right.
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
from treeflash.decoding.sampling import noisy_logits, position_keys
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.text.options import Options
from treeflash.text.tokenizer import REPLACEMENT


@dataclass(frozen=True)
class Judge:
    """Compares answers of the server with answers of the Python API.

    Attributes:
        model: the loaded pair, in float32.
        rounding: the largest difference between the logits of a sequence computed one by one and
            all at once, nats.
    """

    model: LanguageModel
    rounding: float = 0.0

    @classmethod
    def measure(cls, model: LanguageModel, jobs: Sequence[Job]) -> Judge:
        """Make a judge with the rounding of the answers to these jobs."""
        exact = cls(model)
        return cls(model, max(exact._rounding(job) for job in jobs))

    def near_ties(self, job: Job, text: str, tokens: int) -> list[float] | None:
        """Compute the margins of the near-ties at which an answer took the other token.

        After each near-tie the answer must continue as the Python API does.

        Args:
            job: the request.
            text: the answer's text.
            tokens: the answer's number of tokens.

        Returns:
            The margins in order, nats; empty if the answer equals the Python API's answer; None if
            near-ties do not explain it.
        """
        prompt, sampling = self._prompt(job), self._sampling(job)
        pending: list[tuple[list[int], list[float]]] = [([], [])]
        while pending:
            start, margins = pending.pop()
            expected = self._continue(job, prompt, start)
            if (self.model.tokenizer.decode(expected), len(expected)) == (text, tokens):
                return margins
            positions = np.arange(len(prompt), len(prompt) + len(expected), dtype=np.int32)
            rows = one_by_one(self.model, prompt, expected)
            near = near_best(rows, sampling, positions, self.rounding)
            for i in range(len(start), len(expected)):
                for token, margin in near[i].items():
                    other = [*expected[:i], token]
                    if token != expected[i] and self._begins(text, other):
                        pending.append((other, [*margins, margin]))
                if not self._begins(text, expected[: i + 1]):
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

    def _continue(self, job: Job, prompt: list[int], start: list[int]) -> list[int]:
        """Return the tokens of the Python API's answer that starts with these tokens."""
        room = job.max_tokens - len(start)
        if not room or (start and start[-1] in self.model.tokenizer.stop_token_ids):
            return start
        options: Options = {**job.options, "max_tokens": room}
        return start + self.model.generate([*prompt, *start], **options).token_ids

    def _begins(self, text: str, tokens: list[int]) -> bool:
        return text.startswith(self.model.tokenizer.decode(tokens).rstrip(REPLACEMENT))


def near_best(
    logits: NDArray[np.float32],
    sampling: SamplingConfig,
    positions: NDArray[np.int32],
    rounding: float,
) -> list[dict[int, float]]:
    """Return the tokens that n positions may sample, and the distance of each from the best one.

    Args:
        logits: (n, vocab).
        sampling: temperature and filters.
        positions: (n,) positions of the tokens.
        rounding: the largest error of each of two logits, nats.
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
    """Return (n, vocab) logits of n tokens after a prompt, from one forward pass for each token."""
    with SequenceSession(model.backend, capacity=len(prompt) + len(tokens)) as session:
        session.extend(prompt[:-1])
        rows = []
        for root in [prompt[-1], *tokens[:-1]]:
            rows.append(session.logits(DraftTree.root_only(root)))
            session.commit(np.zeros(1, np.int32))
    return np.concatenate(rows)


def at_once(
    model: LanguageModel, prompt: Sequence[int], tokens: Sequence[int]
) -> NDArray[np.float32]:
    """Return the (n, vocab) logits of n tokens after a prompt, from one forward pass."""
    chain = DraftTree.chain(np.array([prompt[-1], *tokens[:-1]], np.int32))
    with SequenceSession(model.backend, capacity=len(prompt) + len(tokens)) as session:
        session.extend(prompt[:-1])
        return session.logits(chain)
