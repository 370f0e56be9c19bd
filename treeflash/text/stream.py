"""Streams: an iterator of text chunks over the decode loop, and where the text ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from treeflash.config import AUTO, DecodeConfig, SamplingConfig
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import Step, decode
from treeflash.decoding.statistics import Stats
from treeflash.decoding.tree import DraftTree
from treeflash.text.detokenizer import TextStream
from treeflash.text.generation import Generation
from treeflash.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Chunk:
    """What one target forward pass added to the text.

    Attributes:
        text: new text that is final; empty while a character or a possible stop string is
            incomplete.
        token_ids: new tokens, without those after a stop string.
        step: the step of the decode loop, with all of its tokens and its tree, but not its table.
        finish_reason: `stop` or `length` in the last chunk, None before.
    """

    text: str
    token_ids: tuple[int, ...]
    step: Step
    finish_reason: str | None


class Stream(Iterator[Chunk]):
    """An iterator of chunks, with the whole generation available at any moment.

    An interruption loses no chunk that was complete: `generation` then gives them, with the finish
    reason `interrupted`.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        config: DecodeConfig,
        stop: Sequence[str] = (),
        adaptive_budget: AdaptiveBudget | None = None,
    ) -> None:
        """Check the arguments; decoding starts with the first chunk.

        Args:
            backend: a loaded pair.
            tokenizer: the target's.
            prompt_ids: the prompt.
            config: how to decode.
            stop: strings to stop at.
            adaptive_budget: see `decode`.

        Raises:
            PromptError: the prompt is empty, too long, or has tokens outside the vocabulary.
            ConfigError: the method needs what was not loaded, or a stop string is empty.
        """
        self.prompt_ids = tuple(prompt_ids)
        self.config = config
        self._backend = backend
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._text = TextStream(tokenizer, stop)
        self._adaptive_budget = adaptive_budget
        self._steps = decode(backend, prompt_ids, config, adaptive_budget)
        self._chunks: list[Chunk] = []

    def __next__(self) -> Chunk:
        if self.finish_reason is not None:
            raise StopIteration
        # A stream keeps its steps, and tables would take most of the memory.
        step = replace(next(self._steps), table=None)
        before = self._text.tokens_used
        text = self._text.push(step.tokens)
        used = self._text.tokens_used - before
        finish_reason = "stop" if self._text.stopped else step.finish_reason
        if finish_reason is not None:
            text += self._text.finish()
        chunk = Chunk(text, step.tokens[:used], step, finish_reason)
        # The only change to what `generation` reads, so that an interruption leaves it consistent.
        self._chunks.append(chunk)
        if finish_reason is not None:
            self._steps = iter(())  # a finished text no longer needs its keys and values
        return chunk

    @property
    def finish_reason(self) -> str | None:
        """`stop` or `length` once the text is complete, None before."""
        return self._chunks[-1].finish_reason if self._chunks else None

    @property
    def steps(self) -> list[Step]:
        """The steps so far; the first is the prefill."""
        return [chunk.step for chunk in self._chunks]

    def again(self, config: DecodeConfig, prompt_ids: Sequence[int] | None = None) -> Stream:
        """A new stream with the same pair and stop strings, and the same or another prompt.

        Raises:
            PromptError, ConfigError: as for the first.
        """
        ids = self.prompt_ids if prompt_ids is None else prompt_ids
        return Stream(
            self._backend, self._tokenizer, ids, config, self._stop, self._adaptive_budget
        )

    def logits_after(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """(vocab,) raw logits of the target after the prompt and some new tokens, without drafting.

        For analysis: it runs the whole text anew.
        """
        *context, last = *self.prompt_ids, *token_ids
        with closing(self._backend.verifier(features=False)) as verifier:
            if context:
                verifier.prefill(context, SamplingConfig(), None)
            logits: NDArray[np.float32] = verifier.logits(DraftTree.root_only(last))[0]
        return logits

    def run(self) -> Generation:
        """Decode to the end."""
        for _ in self:
            pass
        return self.generation()

    def generation(self) -> Generation:
        """All chunks so far as one result; `interrupted` if the text is not complete."""
        token_ids = [token for chunk in self._chunks for token in chunk.token_ids]
        stats = Stats()
        for step in self.steps:
            stats.add(step)
        stats.cut(len(token_ids))
        if self.finish_reason is None:
            # Includes text that the chunks held back.
            text = self._tokenizer.decode(token_ids)
        else:
            text = "".join(chunk.text for chunk in self._chunks)
        return Generation(
            text=text,
            token_ids=token_ids,
            prompt_tokens=len(self.prompt_ids),
            accepted_lengths=stats.accepted_lengths,
            histogram=stats.histogram,
            block_efficiency=stats.block_efficiency,
            tokens_per_s=stats.tokens_per_s,
            prefill_s=stats.prefill_s,
            decode_s=stats.decode_s,
            seconds=stats.seconds,
            method=self.config.method,
            budget=AUTO if self.config.budget == AUTO else int(self.config.budget),
            backend=self._backend.name,
            device=self._backend.device,
            dtype=self._backend.dtype,
            seed=int(self.config.sampling.seed),  # NumPy's numbers are not JSON
            finish_reason=self.finish_reason or "interrupted",
        )
