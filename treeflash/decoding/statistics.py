"""Figures of one generation, from its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from treeflash.decoding.loop import Phase, Step

PHASES: tuple[Phase, ...] = ("prefill", "draft", "tree", "verify", "commit")


@dataclass
class Stats:
    """Accepted lengths and times of a generation; grows step by step.

    Attributes:
        accepted_lengths: committed tokens of each iteration: accepted draft tokens and the bonus
            token, less what a stop cut off. The prefill's token is not an iteration's.
        seconds: time by phase.
    """

    accepted_lengths: list[int] = field(default_factory=list)
    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    tokens: int = 0

    def add(self, step: Step) -> None:
        """Count one more step."""
        self.tokens += len(step.tokens)
        if step.tree is not None:
            self.accepted_lengths.append(len(step.tokens))
        for phase, seconds in step.seconds.items():
            self.seconds[phase] += seconds

    def cut(self, tokens: int) -> None:
        """Forget tokens beyond the first `tokens`, where a stop string ended the text."""
        excess = self.tokens - tokens
        self.tokens = min(self.tokens, tokens)
        while excess > 0 and self.accepted_lengths:
            last = self.accepted_lengths.pop()
            if last > excess:
                self.accepted_lengths.append(last - excess)
            excess -= last

    @property
    def block_efficiency(self) -> float:
        """Committed tokens per target forward after prefill; 1 for plain decoding."""
        return mean(self.accepted_lengths)

    @property
    def prefill_s(self) -> float:
        """Seconds until the first token was chosen."""
        return self.seconds["prefill"]

    @property
    def decode_s(self) -> float:
        """Seconds after that."""
        return sum(self.seconds.values()) - self.prefill_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the iterations per second of decoding; 0 where there was no iteration."""
        return sum(self.accepted_lengths) / self.decode_s if self.decode_s else 0.0

    @property
    def histogram(self) -> dict[int, int]:
        """Iterations by accepted length, shortest first."""
        return dict(sorted(Counter(self.accepted_lengths).items()))


def mean(values: Iterable[float]) -> float:
    """The mean, or 0 of nothing."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0
