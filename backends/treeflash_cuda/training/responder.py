"""The target answering many prompts at once: data for training, not speculative decoding.

Continuous batching: a text that ends gives its slot to the next prompt. Only its throughput
matters, so it has neither drafter nor trees; what it chooses is what plain decoding chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from treeflash.config import SamplingConfig
from treeflash.sampling import uniforms
from treeflash.training import Request
from treeflash_cuda.attention import SlotVisibility, Visibility, looking
from treeflash_cuda.sampler import choose
from treeflash_cuda.target import Target

PREFILL_TOKENS = 8192
"""Prompt tokens that run in one forward at most, padding included."""


class SlotCache(Cache):
    """Keys and values of many texts, a slot each, in storage of fixed size.

    Attributes:
        storage: (layers, 2, slots, kv_heads, columns, head_dim); None until the first forward.
        positions: (slots,) where the next token of each goes.
        admitted: slots whose prompts are being run; None while all take one token.
        columns: that a forward of one token each looks at.
    """

    def __init__(self, layers: int, slots: int, capacity: int) -> None:
        """Start empty."""
        super().__init__(layers=[])
        self.shape = (layers, 2, slots, capacity)
        self.storage: Tensor | None = None
        self.positions = torch.zeros(slots, dtype=torch.long)
        self.admitted: Tensor | None = None
        self.columns = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by a layer with the keys and values of its forward."""
        if self.storage is None:
            layers, two, slots, capacity = self.shape
            heads, head_dim = key_states.shape[1], key_states.shape[3]
            self.storage = key_states.new_zeros(layers, two, slots, heads, capacity, head_dim)
        keys, values = self.storage[layer_idx]
        if self.admitted is not None:
            n = key_states.shape[2]
            keys[self.admitted, :, :n] = key_states
            values[self.admitted, :, :n] = value_states
            return key_states, value_states
        rows = torch.arange(len(self.positions), device=keys.device)
        keys[rows, :, self.positions] = key_states[:, :, 0]
        values[rows, :, self.positions] = value_states[:, :, 0]
        return keys[:, :, : self.columns], values[:, :, : self.columns]

    def keep(self, slots: Tensor) -> None:
        """Drop all slots but these."""
        assert self.storage is not None
        self.storage = self.storage[:, :, slots]
        self.positions = self.positions[slots]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the forward, as far as a model that is given positions cares."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Likewise."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a forward sees, and the first of them."""
        return (query_length if self.admitted is not None else self.columns), 0


class Responder:
    """`treeflash.training.Responder` in PyTorch."""

    def __init__(self, target: Target) -> None:
        """Take a loaded target."""
        self.target = target
        self.vocab_size = target.vocab_size
        self.max_positions = int(target.config.max_position_embeddings)

    @torch.inference_mode()
    def respond(
        self, requests: Sequence[Request], stop_token_ids: frozenset[int], slots: int
    ) -> Iterator[tuple[int, list[int]]]:
        """See `Responder.respond`."""
        # The longest prompts first: those that run together are padded to one length.
        waiting = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        if not waiting:
            return
        slots = min(slots, len(waiting))
        capacity = max(len(r.prompt_ids) + r.max_tokens for r in requests)
        cache = SlotCache(len(self.target.layers), slots, capacity)
        cache.positions = cache.positions.to(self.target.device)
        answers: list[_Answer | None] = [None] * slots
        while waiting or any(answers):
            free = [slot for slot, answer in enumerate(answers) if answer is None]
            if waiting and 4 * len(free) >= slots:
                admitted = {
                    slot: _Answer(index := waiting.pop(), requests[index])
                    for slot in free[: len(waiting)]
                }
                self._prefill(cache, admitted)
                for slot, answer in admitted.items():
                    answers[slot] = answer
            elif not waiting and 2 * len(free) >= len(answers):
                busy = [slot for slot, answer in enumerate(answers) if answer is not None]
                cache.keep(torch.tensor(busy, device=self.target.device))
                answers = [answers[slot] for slot in busy]
            self._step(cache, answers)
            for slot, answer in enumerate(answers):
                if answer is not None and answer.ended(stop_token_ids):
                    yield answer.index, answer.tokens
                    answers[slot] = None

    def _prefill(self, cache: SlotCache, admitted: dict[int, _Answer]) -> None:
        """Run all tokens of new prompts but the last, which the next step takes."""
        slots = list(admitted)
        longest = max(len(answer.request.prompt_ids) for answer in admitted.values()) - 1
        rows = max(1, PREFILL_TOKENS // max(longest, 1))
        device = self.target.device
        for first in range(0, len(slots), rows):
            part = slots[first : first + rows]
            prompts = [admitted[slot].request.prompt_ids[:-1] for slot in part]
            width = max(len(prompt) for prompt in prompts)
            cache.admitted = torch.tensor(part, device=device)
            cache.positions[cache.admitted] = torch.tensor(
                [len(prompt) for prompt in prompts], device=device
            )
            if width:
                tokens = np.zeros((len(part), width), np.int64)
                for row, prompt in zip(tokens, prompts, strict=True):
                    row[: len(prompt)] = prompt
                visibility = Visibility.whole(width, device)
                # What follows a shorter prompt is written over before anything sees it.
                self._forward(
                    torch.from_numpy(tokens).to(device),
                    visibility.positions.expand(len(part), -1),
                    visibility,
                    cache,
                )
        cache.admitted = None

    def _step(self, cache: SlotCache, answers: list[_Answer | None]) -> None:
        """Choose one more token for every answer."""
        device = self.target.device
        live = {slot: answer for slot, answer in enumerate(answers) if answer is not None}
        newest = torch.tensor([a.newest if a else 0 for a in answers], device=device)
        cache.columns = 1 + max(answer.position for answer in live.values())
        # A free slot still takes part; it must stay inside the storage.
        cache.positions.clamp_(max=cache.columns - 1)
        positions = cache.positions[:, None]
        visibility = SlotVisibility(cache.positions, cache.columns)
        hidden = self._forward(newest[:, None], positions, visibility, cache)[:, 0]
        cache.positions += 1
        # What is chosen in the same way is chosen together; seeds only tell the draws apart.
        groups: dict[SamplingConfig, list[int]] = {}
        for slot, answer in live.items():
            groups.setdefault(replace(answer.request.sampling, seed=0), []).append(slot)
        for sampling, group in groups.items():
            draws = None
            if not sampling.greedy:
                draws = np.concatenate([live[slot].draw() for slot in group])
            logits = self.target.output(hidden[torch.tensor(group, device=device)])
            for slot, token in zip(group, choose(logits, sampling, draws), strict=True):
                live[slot].tokens.append(int(token))

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        visibility: Visibility | SlotVisibility,
        cache: SlotCache,
    ) -> Tensor:
        """(rows, n, hidden_size) before the output head."""
        with looking(visibility):
            output = self.target.model.get_decoder()(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                **{self.target.cache_argument: cache},
            )
        hidden: Tensor = output.last_hidden_state
        return hidden


class _Answer:
    """A request at work."""

    def __init__(self, index: int, request: Request) -> None:
        self.index = index
        self.request = request
        self.tokens: list[int] = []

    @property
    def newest(self) -> int:
        return self.tokens[-1] if self.tokens else self.request.prompt_ids[-1]

    @property
    def position(self) -> int:
        """Of the newest token."""
        return len(self.request.prompt_ids) + len(self.tokens) - 1

    def draw(self) -> np.ndarray:
        """(1,) the random number that decides the next token."""
        return uniforms(self.request.sampling.seed, np.array([self.position + 1], np.int32))

    def ended(self, stop_token_ids: frozenset[int]) -> bool:
        return self.newest in stop_token_ids or len(self.tokens) == self.request.max_tokens
