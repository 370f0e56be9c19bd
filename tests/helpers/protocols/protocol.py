"""What the protocol suite asks of an API: a question in no API's words, and its answer."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
from servers import NAME, check_error, error_of


@dataclass(frozen=True)
class LogProb:
    """The log probability of a token, and those of the most probable tokens by their names."""

    token: str
    value: float
    top: Mapping[str, float]


@dataclass(frozen=True)
class Call:
    """A call of a function; `id` is empty if the API's package drops it."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass
class Answer:
    """What an API's package makes of an answer or a stream.

    Attributes:
        text: the content of the message.
        thinking: the reasoning of the message.
        calls: the calls of the message.
        reason: why it ended: `stop`, `length` or, where the API tells them apart, `calls`.
        stop_string: the stop string that ended it, where the API names it.
        prompt_tokens: the number of tokens of the prompt.
        new_tokens: the number of tokens of the answer.
        log_probs: one for each token, if they were asked for.
        pieces: the pieces of text and reasoning in which a stream brought it.
        message: the message as the package has it, to be sent back.
    """

    text: str = ""
    thinking: str = ""
    calls: list[Call] = field(default_factory=list)
    reason: str | None = None
    stop_string: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    log_probs: list[LogProb] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    message: Any = None

    def add(self, text: str | None, thinking: str | None) -> None:
        """Add a piece of a stream."""
        self.text += text or ""
        self.thinking += thinking or ""
        self.pieces += filter(None, (text, thinking))


@dataclass(frozen=True)
class Ask:
    """A question of the user.

    Attributes:
        text: what the user says.
        model: the name of the model.
        system: the system message.
        images: images in base64, before the text.
        answered: the assistant's answer to it, which has calls, and `results` of the calls.
        results: the results, in the order of the calls.
        begun: the beginning of the answer, which is to be continued.
        max_tokens: the most tokens of the answer; None leaves it to the server.
        stop: the strings that end the answer.
        functions: dicts with `name`, `parameters` and maybe `strict`.
        choice: `auto`, `none`, `required` or the name of the function to call.
        parallel: whether there may be several calls.
        schema: the JSON schema of the answer.
        thinks: whether to reason; None leaves it to the server.
        log_probs: the number of most probable tokens to list beside each token; None for none.
    """

    text: str = "Hello."
    model: str = NAME
    system: str | None = None
    images: Sequence[str] = ()
    answered: Answer | None = None
    results: Sequence[str] = ()
    begun: str | None = None
    max_tokens: int | None = 12
    stop: Sequence[str] = ()
    functions: Sequence[Mapping[str, Any]] = ()
    choice: str | None = None
    parallel: bool = True
    schema: Mapping[str, Any] | None = None
    thinks: bool | None = None
    log_probs: int | None = None


MODES = ("auto", "none", "required", None)


def given(**fields: Any) -> dict[str, Any]:
    """Leave out the fields that are None."""
    return {name: value for name, value in fields.items() if value is not None}


class Protocol(ABC):
    """An API: how to say a question, and how to read the answer through the API's own package.

    Attributes:
        path: the path of its requests.
        can: what it has, of `CAPABILITIES`.
        failure: the package's errors for a failed request or stream.
    """

    path: ClassVar[str]
    can: ClassVar[frozenset[str]]
    failure: ClassVar[type[Exception] | tuple[type[Exception], ...]]

    @abstractmethod
    def body(self, ask: Ask) -> dict[str, Any]:
        """Return the body of a request for a whole answer."""

    def request(self, ask: Ask, *, stream: bool = False) -> tuple[str, dict[str, Any]]:
        """Return the path and the body of a request for a whole answer or a stream."""
        return self.path, self.body(ask) | {"stream": stream}

    @abstractmethod
    def ask(self, url: str, ask: Ask, *, stream: bool = False) -> Answer:
        """Ask a server through the API's package, for a whole answer or a stream."""

    def frames(self, text: str) -> list[dict[str, Any]]:
        """Return the events of a stream that ended with an error."""
        lines = [line for line in text.splitlines() if line.startswith("data: ")]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def last_message(self, text: str) -> str:
        """Return the message of the error that ends a stream."""
        return error_of(self.path, self.frames(text)[-1])["message"]

    def told(self, response: httpx.Response, status: int) -> str:
        """Return the message of an error: a whole answer's, with this status, or a stream's."""
        if json.loads(response.request.content)["stream"]:
            assert response.status_code == 200
            return self.last_message(response.text)
        return check_error(response, status)
