"""What a backend that can train implements, beside the interfaces that decoding needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from treeflash.config import LoadConfig, SamplingConfig
from treeflash.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt that the target is to answer for training data.

    Attributes:
        prompt_ids: at least one token.
        sampling: how to choose; the answer is the one that plain decoding gives.
        max_tokens: new tokens at most.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingConfig
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Response:
    """A prompt and what the target answered.

    Attributes:
        prompt_ids: through the chat template, up to the answer.
        response_ids: the answer, with its end token where the target ended it.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The whole text."""
        return self.prompt_ids + self.response_ids

    def __len__(self) -> int:
        """Tokens of the whole text."""
        return len(self.prompt_ids) + len(self.response_ids)

    def cut(self, length: int) -> Response:
        """The first `length` tokens."""
        kept = max(0, length - len(self.prompt_ids))
        return Response(prompt_ids=self.prompt_ids, response_ids=self.response_ids[:kept])


class Responder(Protocol):
    """A target that answers many prompts at once.

    Attributes:
        target: name of the target's folder.
        backend: name of the backend that runs it.
        dtype: the precision it runs in.
        max_positions: the most tokens of a prompt and its response together.
    """

    target: str
    backend: str
    dtype: str
    max_positions: int

    def respond(
        self, requests: Sequence[Request], stop_token_ids: frozenset[int], slots: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Answer all requests in their order, as many as `slots` at a time.

        Yields:
            The index of a request and its new tokens, the stop token included, as they finish.

        Raises:
            NumericalError: the logits are not finite.
        """


class Trainer(Protocol):
    """The entry point of a backend that can train, in the group `treeflash.trainers`."""

    def responder(self, target: Path, config: LoadConfig) -> Responder:
        """Load a target to answer prompts; raises what `Loader` raises."""

    def train(
        self,
        target: Path,
        responses: Sequence[Response],
        output: Path,
        config: TrainConfig,
        load: LoadConfig,
        held_out: Sequence[Response] = (),
    ) -> Iterator[dict[str, Any]]:
        """Train a drafter, or go on where an earlier run of this configuration stopped.

        Args:
            target: its folder.
            responses: what to learn from.
            output: the folder of the checkpoint, its model card, the log and the state.
            config: of the training.
            load: where, and in which precision the target and the arithmetic of training run.
            held_out: what to validate on; other answers to its prompts are left out of
                `responses`. Where there is none, `validation_sequences` of those are held out.

        Yields:
            What the log holds: a record of each step, and of each validation.

        Raises:
            ConfigError: the configuration does not fit the target, or what `output` holds.
            NumericalError: the loss is not finite.
        """
