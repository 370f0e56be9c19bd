"""Which responses a run learns from, and which it holds out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from treeflash.errors import ConfigError
from treeflash.training.config import TrainConfig
from treeflash.training.interfaces import Response
from treeflash_cuda.target import Target


def usable(responses: Sequence[Response], config: TrainConfig, target: Target) -> list[Response]:
    """The texts that have something to predict after cutting.

    Raises:
        ConfigError: there are none, or they have tokens that the target does not know.
    """
    limit = min(config.max_length, target.max_positions)
    texts = [response.truncate(limit) for response in responses]
    texts = [text for text in texts if len(text.response_ids) > 1]
    if not texts:
        raise ConfigError("no response has two tokens or more within max-length; raise it")
    if max(max(text.token_ids) for text in texts) >= target.vocab_size:
        raise ConfigError(
            "the responses have token ids outside the target's vocabulary; "
            "were they made with another target?"
        )
    return texts


def split(
    texts: Sequence[Response], given: Sequence[Response], config: TrainConfig
) -> tuple[list[Response], list[Response]]:
    """Texts to validate on and texts to train on; one prompt's answers stay together.

    Args:
        texts: to train on.
        given: to validate on; where there are none, some of `texts`.
        config: how many, and the seed.

    Raises:
        ConfigError: nothing is left to train on.
    """
    groups: dict[tuple[int, ...], list[Response]] = {}
    for text in texts:
        groups.setdefault(text.prompt_ids, []).append(text)
    held_out = list(given)
    for text in given:
        groups.pop(text.prompt_ids, None)
    wanted = 0 if given else config.validation_sequences
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(config.seed))
    rest: list[Response] = []
    prompts = list(groups)
    for n in order.tolist():
        chosen = held_out if len(held_out) < wanted else rest
        chosen.extend(groups[prompts[n]])
    if not rest:
        raise ConfigError(
            f"{len(texts)} responses leave nothing to train on beside {len(held_out)} to "
            "validate; give more, or fewer to validate"
        )
    return held_out, rest
