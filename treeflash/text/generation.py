"""One finished text, and how it was made: tokens, accepted lengths, times."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from treeflash.config import Budget
from treeflash.decoding.loop import Phase


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a text compares with plain decoding of the same prompt, seed and loaded model.

    Attributes:
        equal: whether both are the same, token for token.
        first_difference: index of the first new token that differs; None if none does.
        speedup: tokens per second over those of plain decoding; None if either had no iteration.
        margin: how far the logits there would have to move for both tokens to be chosen: when
            greedy, the distance of the two best logits; None without two tokens to compare.
        spacing: distance of neighbouring numbers of the model's type around these logits.
        near_tie: whether rounding explains the difference; never in float32.
    """

    equal: bool
    first_difference: int | None
    speedup: float | None
    margin: float | None = None
    spacing: float | None = None
    near_tie: bool = False

    @property
    def explained(self) -> bool:
        """Whether the texts are equal, or differ by no more than rounding."""
        return self.equal or self.near_tie

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object; the margin only if the texts differ."""
        names = ["equal", "first_difference", "speedup"]
        if not self.equal:
            names += ["margin", "spacing", "near_tie"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class TokenLogProb:
    """How probable a new token was: natural logarithms of the target's probabilities.

    They are those at temperature 1, before penalties, biases and filters.

    Attributes:
        token_id: the new token.
        log_prob: its log probability.
        top: the most probable tokens and their log probabilities, best first; as many as were
            asked for.
    """

    token_id: int
    log_prob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was generated, how, and what it cost.

    Once there is a token, `1 + sum(accepted_lengths) == len(token_ids)`: one comes from the
    prefill, the others from the iterations.

    Attributes:
        text: the new text, without special tokens, ending before a stop string.
        token_ids: the new tokens; the last is the stop token that was met, or the token that
            completed a stop string.
        prompt_tokens: number of tokens in the prompt.
        accepted_lengths: tokens committed by each iteration.
        histogram: iterations by accepted length, shortest first.
        block_efficiency: the mean of `accepted_lengths`; 0 if there was no iteration.
        tokens_per_s: tokens of the iterations divided by `decode_s`; a text that shares its
            iterations with others has its own tokens, but the time of all.
        prefill_s: seconds until the first token was chosen.
        decode_s: seconds of the iterations.
        seconds: the same time by phase: prefill, draft, tree, verify, commit.
        finish_reason: `stop` (a stop token or string), `length` (the limit), or `interrupted`.
        compare: with plain decoding, if that was asked for.
        log_probs: of the new tokens, if they were asked for.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    accepted_lengths: list[int]
    histogram: dict[int, int]
    block_efficiency: float
    tokens_per_s: float
    prefill_s: float
    decode_s: float
    seconds: dict[Phase, float]
    method: str
    budget: Budget
    backend: str
    device: str
    dtype: str
    seed: int
    finish_reason: str
    compare: Comparison | None = None
    log_probs: list[TokenLogProb] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object with the names that scripts rely on."""
        names = (
            "text",
            "token_ids",
            "accepted_lengths",
            "block_efficiency",
            "tokens_per_s",
            "prefill_s",
            "decode_s",
            "method",
            "budget",
            "backend",
            "device",
            "dtype",
            "seed",
            "finish_reason",
        )
        values = {name: getattr(self, name) for name in names}
        if self.compare is not None:
            values["compare"] = self.compare.to_dict()
        if self.log_probs is not None:
            values["log_probs"] = [asdict(token) for token in self.log_probs]
        return values
