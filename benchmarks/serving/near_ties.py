"""Whether rounding explains an answer that is not the Python API's.

A sampled token is the one in whose part of the cumulative distribution the random number lies.
Float32 sums in another order, as beside other texts, move these parts a little. `Rounding` says by
how much; where the random number is nearer to the end of a part than that, either token is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving.servers import Job
from treeflash import LanguageModel
from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import filtered_probs, uniforms
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.text.tokenizer import REPLACEMENT


@dataclass(frozen=True)
class Rounding:
    """The largest differences between a text's tokens computed one by one and all at once.

    Attributes:
        logits: of a logit, nats.
        cumulative: of the cumulative distribution.
    """

    logits: float = 0.0
    cumulative: float = 0.0


@dataclass(frozen=True)
class Judge:
    """Compares answers with the Python API's.

    Attributes:
        model: the loaded pair, in float32.
        rounding: what may decide near-ties.
    """

    model: LanguageModel
    rounding: Rounding

    @classmethod
    def of(cls, model: LanguageModel, jobs: Sequence[Job]) -> Judge:
        """Measure the rounding with the texts of these jobs."""
        exact = cls(model, Rounding())
        found = [exact._rounding(job) for job in jobs]
        logits = max(rounding.logits for rounding in found)
        return cls(model, Rounding(logits, max(rounding.cumulative for rounding in found)))

    def near_ties(self, job: Job, text: str, tokens: int) -> list[float] | None:
        """The margins of the near-ties at which an answer took the other token.

        After each of them the answer must go on as the Python API's does.

        Args:
            job: that was to be done.
            text: of the answer.
            tokens: of the answer.

        Returns:
            In order, each as in `Rounding`; empty if the answer is the Python API's; None if
            near-ties do not explain it.
        """
        prompt, sampling = self._prompt(job), self._sampling(job)
        pending: list[tuple[list[int], list[float]]] = [([], [])]
        while pending:
            begun, margins = pending.pop()
            found = self._continue(job, prompt, begun)
            if (self.model.tokenizer.decode(found), len(found)) == (text, tokens):
                return margins
            draws = self._draws(job, prompt, found)
            rows = one_by_one(self.model, prompt, found)
            for i in range(len(begun), len(found)):
                for token, margin in choices(rows[i], sampling, draws[i], self.rounding).items():
                    other = [*found[:i], token]
                    if token != found[i] and self._begins(text, other):
                        pending.append((other, [*margins, margin]))
                if not self._begins(text, found[: i + 1]):
                    break
        return None

    def _rounding(self, job: Job) -> Rounding:
        prompt, sampling = self._prompt(job), self._sampling(job)
        tokens = self._continue(job, prompt, [])
        alone, together = (rows(self.model, prompt, tokens) for rows in (one_by_one, at_once))
        if sampling.greedy:
            return Rounding(logits=float(abs(alone - together).max()))
        difference = cumulative(alone, sampling) - cumulative(together, sampling)
        return Rounding(cumulative=float(abs(difference).max()))

    def _prompt(self, job: Job) -> list[int]:
        return self.model.tokenizer.chat([{"role": "user", "content": job.question}])

    def _sampling(self, job: Job) -> SamplingConfig:
        return self.model.decode_config(job.options).sampling

    def _draws(self, job: Job, prompt: list[int], tokens: list[int]) -> NDArray[np.float64]:
        positions = np.arange(len(prompt), len(prompt) + len(tokens), dtype=np.int32)
        return uniforms(job.seed, positions)

    def _continue(self, job: Job, prompt: list[int], begun: list[int]) -> list[int]:
        """The tokens of the Python API's answer that begins so."""
        room = job.max_tokens - len(begun)
        if not room or (begun and begun[-1] in self.model.tokenizer.stop_token_ids):
            return begun
        options = {**job.options, "max_tokens": room}
        return begun + self.model.generate([*prompt, *begun], **options).token_ids

    def _begins(self, text: str, tokens: list[int]) -> bool:
        return text.startswith(self.model.tokenizer.decode(tokens).rstrip(REPLACEMENT))


def choices(
    logits: NDArray[np.float32], sampling: SamplingConfig, uniform: float, rounding: Rounding
) -> dict[int, float]:
    """The tokens that may be chosen, and how far each is from being chosen by exact arithmetic.

    Args:
        logits: (vocab,).
        sampling: temperature and filters.
        uniform: the random number.
        rounding: two logits may each be wrong by it, or one cumulative sum.
    """
    if sampling.greedy:
        behind = logits.max() - logits
        near = np.flatnonzero(behind <= 2 * rounding.logits)
        return {int(token): float(behind[token]) for token in near}
    ends = cumulative(logits[None], sampling)[0]
    width = rounding.cumulative
    first, last = np.searchsorted(ends, [uniform - width, uniform + width], side="right")
    begins = np.concatenate([[0.0], ends])
    return {
        token: max(0.0, float(begins[token] - uniform), float(uniform - ends[token]))
        for token in range(int(first), min(int(last), len(ends) - 1) + 1)
    }


def cumulative(logits: NDArray[np.float32], sampling: SamplingConfig) -> NDArray[np.float64]:
    """(n, vocab) where each token's part of the distribution ends, of (n, vocab) logits."""
    sums = filtered_probs(logits, sampling).cumsum(-1)
    return sums / sums[:, -1:]


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
