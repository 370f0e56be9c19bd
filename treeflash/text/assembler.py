"""Joins the steps of one text: detokenises them, cuts the text at stop strings, sums it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from treeflash.config import AUTO, DecodeConfig
from treeflash.decoding.choices import LogProbs
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import Step
from treeflash.decoding.statistics import Stats
from treeflash.text.detokenizer import TextStream
from treeflash.text.generation import Generation, TokenLogProb
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


class Assembler:
    """Turns the steps of one text into chunks, and all chunks so far into a generation.

    Attributes:
        backend: the loaded pair that makes the steps.
        tokenizer: the target's.
        prompt_ids: the prompt.
        config: how the text is decoded.
        stop: strings to stop at.
        chunks: so far.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        config: DecodeConfig,
        stop: Sequence[str] = (),
    ) -> None:
        """Start without steps.

        Raises:
            ConfigError: a stop string is empty.
        """
        self.backend = backend
        self.tokenizer = tokenizer
        self.prompt_ids = tuple(prompt_ids)
        self.config = config
        self.stop = tuple(stop)
        self.chunks: list[Chunk] = []
        self._text = TextStream(tokenizer, stop)

    @property
    def finish_reason(self) -> str | None:
        """`stop` or `length` once the text is complete, None before."""
        return self.chunks[-1].finish_reason if self.chunks else None

    def add(self, step: Step) -> Chunk:
        """Add the next step; after a finish reason there is none."""
        # Chunks keep their steps, and tables would take most of the memory.
        step = replace(step, table=None)
        before = self._text.tokens_used
        text = self._text.push(step.tokens)
        used = self._text.tokens_used - before
        finish_reason = "stop" if self._text.stopped else step.finish_reason
        if finish_reason is not None:
            text += self._text.finish()
        chunk = Chunk(text, step.tokens[:used], step, finish_reason)
        # The only change to what `generation` reads, so that an interruption leaves it consistent.
        self.chunks.append(chunk)
        return chunk

    def generation(self) -> Generation:
        """All chunks so far as one result; `interrupted` if the text is not complete."""
        token_ids = [token for chunk in self.chunks for token in chunk.token_ids]
        stats = Stats()
        for chunk in self.chunks:
            stats.add(chunk.step)
        stats.cut(len(token_ids))
        if self.finish_reason is None:
            # Includes text that the chunks held back.
            text = self.tokenizer.decode(token_ids)
        else:
            text = "".join(chunk.text for chunk in self.chunks)
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
            backend=self.backend.name,
            device=self.backend.device,
            dtype=self.backend.dtype,
            seed=int(self.config.sampling.seed),  # NumPy's numbers are not JSON
            finish_reason=self.finish_reason or "interrupted",
            log_probs=None if self.config.log_probs is None else self._log_probs(),
        )

    def _log_probs(self) -> list[TokenLogProb]:
        return [
            found
            for chunk in self.chunks
            if chunk.step.log_probs is not None
            for found in _plain(chunk.token_ids, chunk.step.log_probs)
        ]


def _plain(token_ids: Sequence[int], log_probs: LogProbs) -> list[TokenLogProb]:
    """The log probabilities of a step's first tokens, in plain Python."""
    return [
        TokenLogProb(
            token_id=token_id,
            log_prob=float(log_probs.chosen[i]),
            top=list(zip(log_probs.tokens[i].tolist(), log_probs.values[i].tolist(), strict=True)),
        )
        for i, token_id in enumerate(token_ids)
    ]
