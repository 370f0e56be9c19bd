"""A text to decode, and what can be wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treeflash.config import DecodeConfig
from treeflash.decoding.constraints import Constraint
from treeflash.decoding.interfaces import Backend
from treeflash.errors import ConfigError, PromptError


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A text to decode.

    Attributes:
        prompt_ids: at least one token.
        config: method, budget, limits, sampling.
        constraint: of the generated tokens; belongs to this request alone.
        salt: only texts with the same salt share the states of a prefix cache.
    """

    prompt_ids: Sequence[int]
    config: DecodeConfig
    constraint: Constraint | None = None
    salt: str = ""


def check(backend: Backend, prompt_ids: Sequence[int], config: DecodeConfig) -> None:
    """Raise the error that decoding this prompt in this way would meet, if any."""
    if config.drafts and backend.drafter_config is None:
        raise ConfigError(
            f"method {config.method} needs a drafter and none was loaded; pass --drafter, "
            "or --method ar"
        )
    if config.uses_head and backend.head is None:
        raise ConfigError(
            f"method {config.method} needs a TreeFlash drafter, and this one has no AR head; "
            "use --method ddtree or --method dflash"
        )
    if not len(prompt_ids):
        raise PromptError("the prompt is empty; give at least one token")
    if len(prompt_ids) >= backend.max_positions:
        raise PromptError(
            f"the prompt has {len(prompt_ids)} tokens and the target's limit is "
            f"{backend.max_positions}, new tokens included; shorten the prompt"
        )
    for token, _ in config.penalties.logit_bias:
        if token >= backend.vocab_size:
            raise ConfigError(
                f"logit_bias has the token id {token}, and the target's vocabulary has "
                f"{backend.vocab_size} tokens"
            )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < backend.vocab_size:
        raise PromptError(
            f"the prompt has token ids outside the target's vocabulary of {backend.vocab_size}; "
            "was it encoded with another model's tokenizer?"
        )
