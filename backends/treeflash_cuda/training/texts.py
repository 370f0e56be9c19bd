"""The responses to train on and those to validate on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from treeflash.errors import ConfigError
from treeflash.training.config import TrainConfig
from treeflash.training.interfaces import Response
from treeflash_cuda.target import Target


def usable(responses: Sequence[Response], config: TrainConfig, target: Target) -> list[Response]:
    """The responses that have a token to predict after truncation.

    Raises:
        ConfigError: there are none, or they have tokens outside the target's vocabulary.
    """
    limit = min(config.max_length, target.max_positions)
    texts = [response.truncate(limit) for response in responses]
    texts = [text for text in texts if len(text.response_ids) > 1]
    if not texts:
        raise ConfigError("no response has two or more tokens within max-length; raise it")
    if max(max(text.token_ids) for text in texts) >= target.vocab_size:
        raise ConfigError(
            "the responses have token ids outside the target's vocabulary; "
            "were they made with another target?"
        )
    return texts


def split(
    texts: Sequence[Response], given: Sequence[Response], config: TrainConfig
) -> tuple[list[Response], list[Response]]:
    """Split into validation texts and training texts; responses to one prompt stay together.

    Args:
        texts: training data.
        given: validation data; if empty, some of `texts` are held out.
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
            f"{len(texts)} responses leave nothing to train on after {len(held_out)} are held "
            "out; give more responses, or hold out fewer"
        )
    return held_out, rest
