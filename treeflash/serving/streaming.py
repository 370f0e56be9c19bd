"""How answers reach the client: whole, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.types import Receive, Scope, Send

from treeflash.decoding import PromptProgress
from treeflash.serving.engine import AnswerUpdate, Completion, Usage
from treeflash.serving.errors import OLLAMA, APIError, api_error
from treeflash.serving.schemas import DecodingSchema, StreamOptions
from treeflash.serving.service import Service
from treeflash.text.stream import Assembler, Chunk
from treeflash.text.tokenizer import Tokenizer

logger = logging.getLogger("treeflash.serving")

T = TypeVar("T")
DONE = format_sse_event(data_str="[DONE]")
EVENTS, LINES = "text/event-stream", "application/x-ndjson"
"""The media types of streams."""


ESCAPED_BREAKS = {ord(x): f"\\u{ord(x):04x}" for x in "\x85\u2028\u2029"}
"""Escape sequences of line breaks that JSON does not escape, but at which some clients split."""


def frame(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """Return the bytes of one server-sent event."""
    return format_sse_event(data_str=one_line(data), event=event)


def json_line(data: Mapping[str, Any]) -> bytes:
    """Return the bytes of one line of a stream of JSON objects."""
    return one_line(data).encode() + b"\n"


def one_line(data: Mapping[str, Any]) -> str:
    """Return an object as JSON that is one line, whatever a client takes for a line break."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text if text.isascii() else text.translate(ESCAPED_BREAKS)


class Formatter(ABC):
    """Writes a completion in one API's form: as a whole once it is finished, or as a stream."""

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """Return the whole answer."""

    @abstractmethod
    def frames(self) -> AsyncIterator[bytes]:
        """Yield the stream."""

    def idle_frame(self) -> bytes:
        """Return what keeps a stream of events alive in which nothing happens."""
        return KEEPALIVE_COMMENT


async def respond(
    service: Service,
    http: Request,
    completion: Completion,
    answer: Formatter,
    stream: bool | None,
) -> Response:
    """Return the response to a request: a body or, if `stream` is true, a stream.

    An error of a whole answer, or a disconnect, is raised as an APIError.
    """
    path = http.url.path
    if stream:
        frames, kind = with_errors(answer.frames(), Exception, api_error, path), LINES
        if not path.startswith(OLLAMA):  # clients of lines know no comments
            seconds = service.engine.settings.keep_alive
            frames, kind = _kept_alive(frames, answer.idle_frame, seconds), EVENTS
        return CompletionStream(service, completion, frames, kind)
    with _running(completion, path):
        try:
            await until_disconnect(completion.wait(), http.receive)
        except Exception as error:
            raise api_error(error) from error
    return JSONResponse(answer.body())


@contextmanager
def _running(completion: Completion, path: str) -> Iterator[None]:
    """Drop the answers that are not finished at the end, and log the tokens and the speed."""
    try:
        with completion:
            yield
    finally:
        counts, seconds = completion.usage, completion.seconds
        logger.info(
            "%s: %d prompt tokens (%d cached), %d new tokens in %.2f s, %.1f tokens/s, "
            "%.2f tokens per iteration, %s",
            path,
            counts.prompt_tokens,
            counts.cached_tokens,
            counts.completion_tokens,
            seconds,
            counts.completion_tokens / seconds,
            (counts.iterations + counts.accepted_tokens) / max(counts.iterations, 1),
            ", ".join(answer.finish_reason or "unfinished" for answer in completion.answers),
        )


class CompletionStream(StreamingResponse):
    """Streams frames; a disconnect drops the answers."""

    def __init__(
        self, service: Service, completion: Completion, frames: AsyncIterator[bytes], kind: str
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(frames, headers=headers, media_type=kind)
        self._completion = completion
        # The model must stay until the stream ends, and the endpoint returns before it begins.
        self._held = ExitStack()
        self._held.enter_context(service.hold())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held, _running(self._completion, scope["path"]):
            await super().__call__(scope, receive, send)


async def _kept_alive(
    frames: AsyncIterator[bytes], idle_frame: Callable[[], bytes], seconds: float
) -> AsyncIterator[bytes]:
    """Yield the frames, and another one whenever there is none for `seconds`."""
    upcoming: asyncio.Future[bytes | None] = asyncio.ensure_future(anext(frames, None))
    try:
        while True:
            await asyncio.wait({upcoming}, timeout=seconds)
            if not upcoming.done():
                yield idle_frame()
                continue
            if (item := upcoming.result()) is None:
                return
            yield item
            upcoming = asyncio.ensure_future(anext(frames, None))
    finally:
        upcoming.cancel()


async def with_errors(
    frames: AsyncIterator[bytes],
    kind: type[Exception],
    describe: Callable[[Any], APIError],
    path: str,
) -> AsyncIterator[bytes]:
    """Yield the frames; an error becomes the last one, since the status has been sent already.

    It has the form of the API that the path belongs to.
    """
    try:
        async for item in frames:
            yield item
    except kind as error:
        body = describe(error).body(path)
        yield json_line(body) if path.startswith(OLLAMA) else frame(body, body.get("type"))


async def until_disconnect(work: Awaitable[T], receive: Receive) -> T:
    """Wait for the result; if the client disconnects before, the work ends with an APIError."""
    run = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({run, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not run.done():
            raise APIError(499, "the client has disconnected")
        return run.result()
    finally:
        run.cancel()
        disconnect.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class ChoicesFormatter(Formatter):
    """Writes a completion as OpenAI's list of choices."""

    id_prefix: ClassVar[str]
    body_object: ClassVar[str]
    """The type of a whole response."""
    chunk_object: ClassVar[str]
    empty_choice: ClassVar[dict[str, Any]]
    """The fields of a choice of a chunk that adds nothing."""

    def __init__(self, service: Service, request: DecodingSchema, completion: Completion) -> None:
        self._tokenizer = service.tokenizer
        self._stream = request.stream_options or StreamOptions()
        self._shows_progress = request.return_progress
        self._completion = completion
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
        }

    @abstractmethod
    def choice(self, index: int, answer: Assembler) -> dict[str, Any]:
        """Return a finished answer."""

    @abstractmethod
    def chunk_choices(self, update: AnswerUpdate) -> Iterator[dict[str, Any]]:
        """Return the choices of the chunks that an update of an answer becomes."""

    def body(self) -> dict[str, Any]:
        choices = [self.choice(i, answer) for i, answer in enumerate(self._completion.answers)]
        head = {**self._head, "object": self.body_object}
        return {**head, "choices": choices, **self._statistics()}

    @property
    def counts(self) -> Usage:
        return self._completion.usage

    async def frames(self) -> AsyncIterator[bytes]:
        with_usage = bool(self._stream.include_usage)
        always = with_usage and bool(self._stream.continuous_usage_stats)
        if self._shows_progress:
            async for told in self._completion.prompt_updates():
                choice = {"index": told.index, **self.empty_choice, "finish_reason": None}
                yield self._chunk([choice], prompt_progress=prompt_progress(told.progress))
        async for update in self._completion:
            for choice in self.chunk_choices(update):
                yield self._chunk([choice], with_usage=always)
        if with_usage:
            yield self._chunk([], with_usage=True)
        yield DONE

    def draft_tree(self, update: AnswerUpdate) -> dict[str, Any]:
        """Return the field `draft_tree` of a choice, if the request asks for it.

        It has `iteration`; `seconds` that it took, for all sequences of its batch; `tokens`, the
        texts of the committed tokens; `paused` if the budget `auto` left the draft out, because it
        would cost more than it brings; and after the prefill, for a tree of n nodes, `nodes` (the
        texts of the drafted tokens, the root first), `parents` (indices, -1 for the root) and
        `path` (the indices of the accepted nodes).
        """
        if not self._stream.include_draft_trees:
            return {}
        text, step = self._tokenizer.token_text, update.chunk.step
        tree: dict[str, Any] = {
            "iteration": update.iteration,
            "seconds": sum(step.seconds.values()),
            "tokens": [text(token) for token in update.chunk.token_ids],
        }
        config = self._completion.answers[update.index].config
        plain = step.tree is None or len(step.tree) == 1
        if update.iteration and plain and config.drafts and config.is_adaptive:
            tree["paused"] = True
        if step.tree is not None and step.path is not None:
            tree["nodes"] = [text(token) for token in step.tree.tokens.tolist()]
            tree["parents"] = step.tree.parents.tolist()
            tree["path"] = step.path.tolist()
        return {"draft_tree": tree}

    def _chunk(
        self, choices: list[dict[str, Any]], *, with_usage: bool = False, **fields: Any
    ) -> bytes:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices, **fields}
        return frame(chunk | self._statistics() if with_usage else chunk)

    def _statistics(self) -> dict[str, Any]:
        """Return OpenAI's usage, and the counts of drafts as vLLM and llama.cpp name them."""
        counts = self.counts
        timings = {"draft_n": counts.drafted_tokens, "draft_n_accepted": counts.accepted_tokens}
        return {
            "usage": {
                "prompt_tokens": counts.prompt_tokens,
                "completion_tokens": counts.completion_tokens,
                "total_tokens": counts.prompt_tokens + counts.completion_tokens,
                "prompt_tokens_details": cached_details(counts),
                "draft_tokens_details": draft_details(counts),
            },
            "metrics": {"speculative_decoding": speculative_decoding(self._completion)},
            "timings": timings,
        }


def prompt_progress(progress: PromptProgress) -> dict[str, Any]:
    """Return how much of a prompt has run, as llama.cpp names it."""
    return {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.done,
        "time_ms": round(1000 * progress.seconds, 3),
    }


def speculative_decoding(completion: Completion) -> dict[str, Any] | None:
    """Return vLLM's statistics of a single answer's drafts; None for several answers.

    A step is an iteration with a draft. `acceptance_histogram[j]` counts the steps that accepted j
    drafted tokens, of at most `num_spec_tokens`, the deepest draft.
    """
    if len(completion.answers) > 1:
        return None
    counts = completion.usage
    steps = counts.drafts.total()
    return {
        "mean_acceptance_length": 1 + counts.accepted_tokens / max(steps, 1),
        "draft_acceptance_rate": counts.accepted_tokens / max(counts.drafted_tokens, 1),
        "acceptance_histogram": [counts.drafts[n] for n in range(counts.deepest_draft + 1)],
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": counts.accepted_tokens,
        "num_draft_tokens": counts.drafted_tokens,
        "num_spec_tokens": counts.deepest_draft,
    }


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    r"""Return a token as OpenAI writes it: `bytes:\xf0\x9f` if it is a part of a character."""
    part = tokenizer.token_bytes(token_id)
    try:
        part.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)
    return tokenizer.token_text(token_id)


def log_prob_entries(tokenizer: Tokenizer, chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    """List the log probability of each token of the chunks, with the most probable ones."""
    return [
        _log_prob(tokenizer, token.token_id, token.log_prob)
        | {"top_logprobs": [_log_prob(tokenizer, *pair) for pair in token.top]}
        for chunk in chunks
        for token in chunk.log_probs
    ]


def _log_prob(tokenizer: Tokenizer, token_id: int, log_prob: float) -> dict[str, Any]:
    part = list(tokenizer.token_bytes(token_id))
    return {"token": token_name(tokenizer, token_id), "logprob": log_prob, "bytes": part}


def cached_details(counts: Usage) -> dict[str, int]:
    """Count the prompt tokens from the prefix cache, and those from its disk tier."""
    from_disk = {"disk_cached_tokens": counts.disk_tokens} if counts.disk_tokens else {}
    return {"cached_tokens": counts.cached_tokens, **from_disk}


def draft_details(counts: Usage) -> dict[str, int]:
    names = ("drafted_tokens", "accepted_tokens", "iterations")
    return {name: getattr(counts, name) for name in names}
