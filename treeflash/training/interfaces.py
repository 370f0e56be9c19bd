"""What a backend that can train implements, in addition to the interfaces for decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from treeflash.config import LoadConfig, SamplingConfig
from treeflash.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt for the target to answer.

    Attributes:
        prompt_ids: at least one token.
        sampling: how to choose tokens; the response equals that of plain decoding.
        max_tokens: maximum number of new tokens.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingConfig
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Response:
    """A prompt and the target's response.

    Attributes:
        prompt_ids: the prompt after the chat template, up to the response.
        response_ids: the response, with its end token if the target ended it.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and response."""
        return self.prompt_ids + self.response_ids

    def __len__(self) -> int:
        """Number of tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    def truncate(self, length: int) -> Response:
        """Truncate the response so that prompt and response have `length` tokens."""
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
        """Answer all requests in order, up to `slots` at the same time.

        Yields:
            The index of each request and its new tokens, stop token included, as it finishes.

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
        """Train a drafter, or resume a run of the same configuration.

        Args:
            target: its folder.
            responses: the training data.
            output: folder for the checkpoint, its model card, the log and the state.
            config: of the run.
            load: device, and the precision of the target and of mixed-precision training.
            held_out: validation data; other responses to its prompts are removed from
                `responses`. If empty, `validation_sequences` of `responses` are held out.

        Yields:
            A record for each step, as in the log; before the first step, the progress of the
            feature cache.

        Raises:
            ConfigError: the configuration does not fit the target or the run in `output`, or
                `output` cannot be written.
            NumericalError: the loss is not finite.
        """
