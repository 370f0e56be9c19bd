"""Requests: what is to be decoded, and whether a pair can decode it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treeflash.config import DecodeConfig, Method
from treeflash.decoding.images import NO_IMAGES, PromptImages
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.sampling import Constraint
from treeflash.drafters.mtp_heads import NO_MARGINALS
from treeflash.errors import ConfigError, ContextLengthError, PromptError


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A sequence to decode. Events and cancellations name a sequence by its request.

    Attributes:
        prompt_ids: at least one token.
        config: method, budget, limits, sampling.
        images: of the prompt, from the backend's `ImageProcessor` together with the ids; None if it
            has none.
        constraint: of the generated tokens; belongs to this request alone.
        scores_prompt: whether the first step has the log probabilities of the prompt. Then nothing
            of it comes from a prefix cache.
        cache_salt: only sequences with the same salt share the states of a prefix cache, and learn
            from each other's texts what to draft.
        tag: anything of the caller's, who finds it again in the request of an event.
    """

    prompt_ids: Sequence[int]
    config: DecodeConfig
    images: PromptImages | None = None
    constraint: Constraint | None = None
    scores_prompt: bool = False
    cache_salt: str = ""
    tag: Any = None

    @property
    def digests(self) -> Mapping[int, bytes]:
        """The digests of the images by their first tokens."""
        return NO_IMAGES if self.images is None else self.images.digests


def check(backend: Backend, request: Request) -> None:
    """Raise the error that decoding this request would meet, if any."""
    prompt_ids, config = request.prompt_ids, request.config
    drafter = backend.drafter_config
    if config.drafts and drafter is None:
        raise ConfigError(
            f"method {config.method} needs a drafter and none was loaded; load a drafter "
            "(--drafter), or use method suffix or ar"
        )
    if config.method == "suffix":
        backend.check_trees()
    if config.uses_head and backend.head is None:
        raise ConfigError(
            f"method {config.method} needs an AR head, and the loaded drafter has no AR head; "
            "use method ddtree or dflash"
        )
    if drafter and config.drafts and not config.uses_head and not drafter.has_marginals:
        raise ConfigError(NO_MARGINALS)
    if not len(prompt_ids):
        raise PromptError("the prompt is empty; give at least one token")
    if len(prompt_ids) >= backend.max_positions:
        raise ContextLengthError(len(prompt_ids), backend.max_positions)
    for token, _ in config.penalties.logit_bias:
        if token >= backend.vocab_size:
            raise ConfigError(
                f"logit_bias has the token id {token}, but the target's vocabulary has only "
                f"{backend.vocab_size} tokens"
            )
    text_ids = np.asarray(prompt_ids)
    if request.images is not None:
        if isinstance(backend.images, str):
            raise PromptError(f"this target takes no images: {backend.images}")
        if request.scores_prompt:
            raise PromptError("a prompt with images cannot be scored; remove them")
        # Placeholders may be outside the vocabulary.
        text_ids = text_ids[~request.images.is_feature]
    if len(text_ids) and not 0 <= text_ids.min() <= text_ids.max() < backend.vocab_size:
        raise PromptError(
            f"the prompt has token ids outside the target's vocabulary of {backend.vocab_size}; "
            "was it encoded with another model's tokenizer?"
        )


def best_method(backend: Backend, *, copies: bool) -> Method:
    """Return the best method of a pair; `copies` is whether one without a drafter copies text."""
    if backend.drafter_config is None:
        return "suffix" if copies else "ar"
    return "ddtree" if backend.head is None else "treeflash"
