"""Streams: an iterator of text chunks over the decode loop of one text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from treeflash.config import DecodeConfig
from treeflash.decoding import decode
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import Step
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.text.assembler import Assembler, Chunk
from treeflash.text.generation import Generation
from treeflash.text.tokenizer import Tokenizer


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
        self._text = Assembler(backend, tokenizer, prompt_ids, config, stop)
        self._adaptive_budget = adaptive_budget
        self._steps = decode(backend, prompt_ids, config, adaptive_budget)

    def __next__(self) -> Chunk:
        if self.finish_reason is not None:
            raise StopIteration
        chunk = self._text.add(next(self._steps))
        if chunk.finish_reason is not None:
            self._steps = iter(())  # a finished text no longer needs its keys and values
        return chunk

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt."""
        return self._text.prompt_ids

    @property
    def config(self) -> DecodeConfig:
        """How the text is decoded."""
        return self._text.config

    @property
    def finish_reason(self) -> str | None:
        """`stop` or `length` once the text is complete, None before."""
        return self._text.finish_reason

    @property
    def steps(self) -> list[Step]:
        """The steps so far; the first is the prefill."""
        return [chunk.step for chunk in self._text.chunks]

    def again(self, config: DecodeConfig, prompt_ids: Sequence[int] | None = None) -> Stream:
        """A new stream with the same pair and stop strings, and the same or another prompt.

        Raises:
            PromptError, ConfigError: as for the first.
        """
        own = self._text
        ids = own.prompt_ids if prompt_ids is None else prompt_ids
        return Stream(own.backend, own.tokenizer, ids, config, own.stop, self._adaptive_budget)

    def logits_after(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """(vocab,) raw logits of the target after the prompt and some new tokens, without drafting.

        For analysis: it runs the whole text anew.
        """
        *context, last = *self.prompt_ids, *token_ids
        with TextSession(self._text.backend, capacity=len(context) + 1) as text:
            if context:
                text.extend(context)
            logits: NDArray[np.float32] = text.logits(DraftTree.root_only(last))[0]
        return logits

    def run(self) -> Generation:
        """Decode to the end."""
        for _ in self:
            pass
        return self.generation()

    def generation(self) -> Generation:
        """All chunks so far as one result; `interrupted` if the text is not complete."""
        return self._text.generation()
