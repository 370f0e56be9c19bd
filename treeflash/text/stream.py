"""Streams of text: one sequence chunk by chunk, or many sequences at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from treeflash.config import AUTO, AUTO_BYTES, AUTO_SEQUENCES, DecodeConfig, Parallel, later_seed
from treeflash.decoding import PromptProgress, Request, Scheduler, SchedulerConfig
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.images import PromptImages
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import Step
from treeflash.decoding.sampling import Constraint
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.suffix import SuffixCache
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError
from treeflash.option import is_whole
from treeflash.text.generation import PHASES, Generation, TokenLogProb
from treeflash.text.tokenizer import SpecialToken, TextStream, Tokenizer


@dataclass(frozen=True, eq=False)
class Chunk:
    """The text that one target forward pass added.

    Attributes:
        text: new and final; empty while a character or a possible stop string is incomplete.
        token_ids: new tokens, without the tokens after a stop string.
        step: the step of the decode loop, with all of its tokens and its tree, but not its table.
        finish_reason: `stop` or `length` in the last chunk, else None.
        special_tokens: special tokens before the end of the text, with their places in it. A chunk
            may have special tokens of an earlier one whose text was held back, and never has the
            end token.
    """

    text: str
    token_ids: tuple[int, ...]
    step: Step
    finish_reason: str | None
    special_tokens: tuple[SpecialToken, ...] = ()

    @property
    def log_probs(self) -> list[TokenLogProb]:
        """The log probabilities of the new tokens; empty if nobody asked for them."""
        values = self.step.log_probs
        return [] if values is None else TokenLogProb.of_tokens(self.token_ids, values)


@dataclass(eq=False)
class Assembler:
    """Turns the steps of one sequence into chunks, and all chunks so far into a generation.

    A ConfigError is raised if a string to stop at is empty. `make_constraint` makes a constraint of
    the new tokens; None leaves them free. `images` are the prompt's. See `Request` for
    `scores_prompt` and `cache_salt`.
    """

    backend: Backend
    tokenizer: Tokenizer
    prompt_ids: tuple[int, ...]
    config: DecodeConfig
    stop: Sequence[str] = ()
    make_constraint: Callable[[], Constraint] | None = None
    images: PromptImages | None = None
    scores_prompt: bool = False
    cache_salt: str = ""
    chunks: list[Chunk] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._text = TextStream(self.tokenizer, self.stop)
        self._length = 0  # characters of the chunks

    def answers(self, count: int) -> list[Assembler]:
        """Return this sequence and others of its prompt, whose seeds are the ones after its own.

        The prompt is scored once for all of them.
        """
        config, sampling = self.config, self.config.sampling
        seeds = [later_seed(sampling.seed, i) for i in range(1, count)]
        configs = [replace(config, sampling=replace(sampling, seed=seed)) for seed in seeds]
        return [self, *(replace(self, config=each, scores_prompt=False) for each in configs)]

    def request(self) -> Request:
        """Return a request for this sequence, with its own constraint and this object as tag."""
        constraint = None if self.make_constraint is None else self.make_constraint()
        return Request(
            prompt_ids=self.prompt_ids,
            config=self.config,
            constraint=constraint,
            images=self.images,
            scores_prompt=self.scores_prompt,
            cache_salt=self.cache_salt,
            tag=self,
        )

    @property
    def finish_reason(self) -> str | None:
        """`stop` or `length` once the text is complete, else None."""
        return self.chunks[-1].finish_reason if self.chunks else None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._text.stopped_by

    def add(self, step: Step) -> Chunk:
        """Add the next step; no step follows a chunk with a finish reason."""
        # Chunks keep their steps, and tables would take most of the memory.
        step = replace(step, table=None)
        stream, token_ids, finish_reason = self._text, step.tokens, step.finish_reason
        before, first = stream.tokens_used, len(stream.special_tokens)
        # An end token of the model has no text, whether it is a special token or not.
        ended = finish_reason == "stop" and token_ids[-1] in self.tokenizer.stop_token_ids
        text = stream.push(token_ids[:-1] if ended else token_ids)
        if stream.stopped_by is not None:
            token_ids, finish_reason = token_ids[: stream.tokens_used - before], "stop"
        if finish_reason is not None:
            text += stream.finish()
        special_tokens = tuple(
            token._replace(position=token.position - self._length)
            for token in stream.special_tokens[first:]
        )
        self._length += len(text)
        chunk = Chunk(text, token_ids, step, finish_reason, special_tokens)
        # `generation` reads nothing else that changes: an interruption leaves it consistent.
        self.chunks.append(chunk)
        return chunk

    def generation(self) -> Generation:
        """Return all chunks so far as one result; `interrupted` if the text is not complete."""
        token_ids = [token for chunk in self.chunks for token in chunk.token_ids]
        steps = [chunk.step for chunk in self.chunks]
        plain = sum(
            step.tree is not None and len(step.tree) == 1 and "draft" not in step.seconds
            for step in steps
        )
        text = "".join(chunk.text for chunk in self.chunks)
        if self.finish_reason is None:
            text = self.tokenizer.decode(token_ids)  # includes the text that the stream holds back
        return Generation(
            text=text,
            token_ids=token_ids,
            prompt_tokens=len(self.prompt_ids),
            accepted_lengths=[
                len(chunk.token_ids) for chunk in self.chunks if chunk.step.tree is not None
            ],
            seconds={
                phase: sum(step.seconds.get(phase, 0.0) for step in steps) for phase in PHASES
            },
            method=self.config.method,
            budget=AUTO if self.config.budget == AUTO else int(self.config.budget),
            backend=self.backend.name,
            device=self.backend.device,
            dtype=self.backend.dtype,
            inexact=self.backend.inexact,
            seed=int(self.config.sampling.seed),  # NumPy's numbers are not JSON
            finish_reason=self.finish_reason or "interrupted",
            paused_iterations=plain if self.config.drafts and self.config.is_adaptive else 0,
            log_probs=None
            if self.config.log_probs is None
            else [token for chunk in self.chunks for token in chunk.log_probs],
        )


class Stream(Iterator[Chunk]):
    """An iterator of chunks, which are added to the assembler. It raises what `decode` does.

    Decoding starts with the first chunk. An interruption loses no complete chunk: `generation`
    joins them, with the finish reason `interrupted`. `close`, or the end of a `with` block, ends
    the text early.

    Attributes:
        on_progress: called after each part of a prompt that runs in several; None is not called.
    """

    on_progress: Callable[[PromptProgress], None] | None = None

    def __init__(self, assembler: Assembler, budgets: AdaptiveBudgets | None = None) -> None:
        self.assembler = assembler
        self._budgets = budgets
        scheduler = Scheduler(assembler.backend, budgets=budgets)
        scheduler.submit(assembler.request())
        self._events = _run(scheduler)

    def __next__(self) -> Chunk:
        for event in self._events:
            if isinstance(event, Step):
                chunk = self.assembler.add(event)
                if chunk.finish_reason is not None:
                    self.close()  # a stop string may have ended the text before its sequence
                return chunk
            if self.on_progress is not None:
                self.on_progress(event)
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the text here and free its KV cache; no chunk follows."""
        self._events.close()

    @property
    def finish_reason(self) -> str | None:
        """`stop` or `length` once the text is complete, else None."""
        return self.assembler.finish_reason

    @property
    def steps(self) -> list[Step]:
        """The steps so far; the first is the prefill."""
        return [chunk.step for chunk in self.assembler.chunks]

    def restart(self, config: DecodeConfig, prompt_ids: Sequence[int] | None = None) -> Stream:
        """Start a stream of the same pair with another configuration, and perhaps other text."""
        assembler = replace(self.assembler, config=config)
        if prompt_ids is not None:
            assembler = replace(assembler, prompt_ids=tuple(prompt_ids), images=None)
        return Stream(assembler, self._budgets)

    def next_logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Compute the target's (vocab,) raw logits after the prompt and some new tokens.

        For analysis: the target runs over the whole sequence again.
        """
        *context, last = *self.assembler.prompt_ids, *token_ids
        with SequenceSession(self.assembler.backend, capacity=len(context) + 1) as session:
            if context:
                session.extend(context, images=self.assembler.images)
            logits: NDArray[np.float32] = session.logits(DraftTree.root_only(last))[0]
        return logits

    def run(self) -> Generation:
        for _ in self:
            pass
        return self.generation()

    def generation(self) -> Generation:
        """Return all chunks so far as one result; `interrupted` if the text is not complete."""
        return self.assembler.generation()


def _run(scheduler: Scheduler) -> Generator[Step | PromptProgress, None, None]:
    """Decode the only sequence of a scheduler; yields its steps and, before them, its progress."""
    with closing(scheduler):
        while scheduler.busy:
            for _, event in scheduler.step():
                if isinstance(event, Exception):
                    raise event
                yield event
            yield from scheduler.prompts.values()


def scheduler_config(parallel: Parallel) -> SchedulerConfig:
    """Return the limits of a scheduler; raises a ConfigError if `parallel` is below 1."""
    if parallel == AUTO:
        return SchedulerConfig(max_parallel=AUTO_SEQUENCES, max_bytes=AUTO_BYTES)
    if not is_whole(parallel, 1):
        raise ConfigError(f"parallel must be auto, or 1 or more, got {parallel!r}")
    return SchedulerConfig(max_parallel=int(parallel))


class BatchStream:
    """Sequences that are decoded together. They join and leave at any time.

    At most `parallel` run at once; the others wait in order. A `suffix_cache` keeps the finished
    sequences, which later ones may copy.
    """

    def __init__(
        self,
        backend: Backend,
        parallel: Parallel,
        budgets: AdaptiveBudgets,
        suffix_cache: SuffixCache | None,
    ) -> None:
        self._scheduler = Scheduler(
            backend, scheduler_config(parallel), budgets=budgets, suffix_cache=suffix_cache
        )

    @property
    def busy(self) -> bool:
        return self._scheduler.busy

    @property
    def has_room(self) -> bool:
        """Whether fewer sequences than `parallel` are here."""
        scheduler = self._scheduler
        return scheduler.running + scheduler.waiting < scheduler.config.max_parallel

    def submit(self, assemblers: Sequence[Assembler]) -> None:
        """Add sequences with the same prompt, which is prefilled once; raises as `decode` does."""
        requests = [assembler.request() for assembler in assemblers]
        self._scheduler.submit_group(requests, raises_limit=True)

    def step(self) -> list[tuple[Assembler, Exception | None]]:
        """Run one iteration; the sequences that it ended, with the error if there was one."""
        finished: list[tuple[Assembler, Exception | None]] = []
        for request, event in self._scheduler.step():
            assembler: Assembler = request.tag
            error = event if isinstance(event, Exception) else None
            if isinstance(event, Exception) or assembler.add(event).finish_reason is not None:
                # A stop string may have ended it.
                self._scheduler.cancel(request, keep=error is None)
                finished.append((assembler, error))
        return finished

    def close(self) -> None:
        self._scheduler.close()
