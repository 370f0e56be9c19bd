"""One finished text and the figures of its making."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treeflash.config import Budget
from treeflash.decoding.loop import Phase


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a text relates to plain decoding with the same prompt, seed and loaded model.

    Attributes:
        equal: whether both are the same, token for token.
        first_difference: index of the first new token that differs; None where there is none.
        speedup: tokens per second over plain decoding's; None where either had no iteration.
    """

    equal: bool
    first_difference: int | None
    speedup: float | None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was generated, how, and what it cost.

    Once there is a token, `1 + sum(accepted_lengths) == len(token_ids)`: the prefill brings one,
    every iteration its accepted length.

    Attributes:
        text: the new text, without special tokens, ending before a stop string.
        token_ids: the new tokens; the last is the stop token that was met, or the token that
            completed a stop string.
        prompt_tokens: tokens of the prompt.
        accepted_lengths: committed tokens of each iteration.
        histogram: iterations by accepted length, shortest first.
        block_efficiency: the mean of `accepted_lengths`; 0 where there was no iteration.
        tokens_per_s: tokens of the iterations per second of `decode_s`.
        prefill_s: seconds until the first token was chosen.
        decode_s: seconds of the iterations.
        seconds: the same time by phase: prefill, draft, tree, verify, commit.
        finish_reason: `stop` (a stop token or string), `length` (the limit), or `interrupted`.
        compare: against plain decoding, where that was asked for.
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
            values["compare"] = vars(self.compare)
        return values
