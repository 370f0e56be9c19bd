"""The result of a generation: its text, tokens, accepted lengths and times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from treeflash.config import Budget
from treeflash.decoding.loop import Phase
from treeflash.decoding.sampling import LogProbs

PHASES: tuple[Phase, ...] = ("prefill", "draft", "tree", "verify", "commit")


def mean(values: Iterable[float]) -> float:
    """Return the mean; 0 without values."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A text compared with plain decoding of the same prompt, seed and loaded model.

    Attributes:
        equal: whether all tokens are equal.
        first_difference: index of the first new token that differs; None if all are equal.
        speedup: tokens per second, divided by the tokens per second of plain decoding; None if
            either had no iteration.
        margin: how far the logits of the first difference would have to move for both tokens to be
            sampled: when greedy, the distance of the two best logits. None without two tokens to
            compare.
        spacing: distance of neighbouring numbers of the model's dtype around these logits.
        near_tie: whether rounding explains the difference; never in float32 or exact mode.
    """

    equal: bool
    first_difference: int | None
    speedup: float | None
    margin: float | None = None
    spacing: float | None = None
    near_tie: bool = False

    @property
    def explained(self) -> bool:
        """Whether the texts are equal, or rounding explains the difference."""
        return self.equal or self.near_tie

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object, with the margin if the texts differ."""
        names = ["equal", "first_difference", "speedup"]
        if not self.equal:
            names += ["margin", "spacing", "near_tie"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class TokenLogProb:
    """The target's log probabilities of a new token and of the most probable tokens, best first.

    They are natural logarithms at temperature 1, before penalties, biases and filters. The option
    `log_probs` is the number of `top`.
    """

    token_id: int
    log_prob: float
    top: list[tuple[int, float]]

    @classmethod
    def of_tokens(cls, token_ids: Sequence[int], values: LogProbs) -> list[TokenLogProb]:
        """Return the log probabilities of tokens; there may be more rows than tokens."""
        return [
            cls(
                token_id=token_id,
                log_prob=float(values.sampled[i]),
                top=list(zip(values.tokens[i].tolist(), values.values[i].tolist(), strict=True)),
            )
            for i, token_id in enumerate(token_ids)
        ]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A generated text, how it was decoded, and the time that it took.

    Unless `token_ids` is empty, `1 + sum(accepted_lengths) == len(token_ids)`: the prefill gives
    one token, the iterations give the others.

    Attributes:
        text: the new text, without special tokens, ending before a stop string.
        token_ids: the new tokens; the last may be a stop token, or have completed a stop string.
        accepted_lengths: numbers of tokens that each iteration committed, accepted draft tokens and
            the bonus token.
        seconds: wall time by phase.
        inexact: why other methods, budgets or batches may give other texts; None in exact mode.
        finish_reason: `stop` (a stop token or string), `length` (`max_tokens`), or `interrupted`.
        paused_iterations: iterations without a draft, because the budget `auto` found that drafts
            cost more than they bring.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    accepted_lengths: list[int]
    seconds: dict[Phase, float]
    method: str
    budget: Budget
    backend: str
    device: str
    dtype: str
    seed: int
    finish_reason: str
    inexact: str | None = None
    paused_iterations: int = 0
    compare: Comparison | None = None
    log_probs: list[TokenLogProb] | None = None

    @property
    def histogram(self) -> dict[int, int]:
        """Number of iterations by accepted length, shortest first."""
        return dict(sorted(Counter(self.accepted_lengths).items()))

    @property
    def block_efficiency(self) -> float:
        """Mean of the accepted lengths; 1 for plain decoding, 0 without an iteration."""
        return mean(self.accepted_lengths)

    @property
    def prefill_s(self) -> float:
        """Seconds until the first token was sampled."""
        return self.seconds["prefill"]

    @property
    def decode_s(self) -> float:
        """Seconds of the iterations."""
        return sum(self.seconds.values()) - self.prefill_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the iterations per second of `decode_s`; 0 without an iteration.

        In a batch, the tokens count one text and the seconds count the whole batch.
        """
        return sum(self.accepted_lengths) / self.decode_s if self.decode_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object with the names that scripts rely on."""
        names = (
            "text token_ids prompt_tokens accepted_lengths block_efficiency tokens_per_s "
            "prefill_s decode_s method budget backend device dtype inexact seed "
            "finish_reason paused_iterations"
        )
        values = {name: getattr(self, name) for name in names.split()}
        if self.compare is not None:
            values["compare"] = self.compare.to_dict()
        if self.log_probs is not None:
            values["log_probs"] = [asdict(token) for token in self.log_probs]
        return values
