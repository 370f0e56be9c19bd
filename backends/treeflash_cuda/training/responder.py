"""The target's responses to many prompts at once, as training data.

Continuous batching: a text that ends gives its slot to the next prompt. Only throughput matters,
so there is neither a drafter nor a tree; the tokens are those of plain decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import uniforms
from treeflash.training.interfaces import Request
from treeflash_cuda.attention import AttentionContext, Context, attention_context
from treeflash_cuda.sampler import choose
from treeflash_cuda.target import Target
from treeflash_cuda.training.slot_cache import SlotCache

REFILL = 16
"""Refill once one of this many slots is free: prefilling several prompts together is faster."""
PREFILL_TOKENS = 8192
"""Maximum number of prompt tokens in one forward pass, padding included."""


class Responder:
    """`treeflash.training.interfaces.Responder` in PyTorch."""

    backend = "cuda"

    def __init__(self, target: str, model: Target) -> None:
        """Take the name of a target and the target, loaded."""
        self.target = target
        self.model = model
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.max_positions = model.max_positions

    @torch.inference_mode()
    def respond(
        self, requests: Sequence[Request], stop_token_ids: frozenset[int], slots: int
    ) -> Iterator[tuple[int, list[int]]]:
        """See `Responder.respond`."""
        if not requests:
            return
        waiting = deque(range(len(requests)))
        slots = min(slots, len(waiting))
        capacity = max(len(r.prompt_ids) + r.max_tokens for r in requests)
        cache = SlotCache(len(self.model.layers), slots, capacity, self.model.device)
        # Chat templates start all prompts with the same tokens, which are run once.
        prefix = _common_prefix([request.prompt_ids[:-1] for request in requests])
        if prefix:
            self._prefill(cache, [prefix])
            cache.share(len(prefix))
        texts: list[_Text | None] = []
        while waiting or any(texts):
            if REFILL * texts.count(None) >= len(texts):
                # In order of age, so that neighbours, which attend together, have similar lengths.
                cache.keep({slot: a.position for slot, a in enumerate(texts) if a})
                texts = [text for text in texts if text]
                new = [waiting.popleft() for _ in range(min(slots - len(texts), len(waiting)))]
                texts += [_Text(index, requests[index]) for index in new]
                # All tokens but the last, which the next step runs.
                self._prefill(cache, [requests[i].prompt_ids[len(prefix) : -1] for i in new])
            self._step(cache, texts)
            for slot, text in enumerate(texts):
                if text is not None and text.ended(stop_token_ids):
                    yield text.index, text.tokens
                    texts[slot] = None

    def _prefill(self, cache: SlotCache, prompts: Sequence[Sequence[int]]) -> None:
        """Run the tokens of prompts after the prefix, each in a new slot."""
        device = self.model.device
        rows = max(1, PREFILL_TOKENS // (1 + max(map(len, prompts), default=0)))
        for first in range(0, len(prompts), rows):
            part = prompts[first : first + rows]
            width = max(map(len, part))
            slot = len(cache.positions)
            cache.append([len(prompt) for prompt in part])
            cache.prompts = slice(slot, slot + len(part))
            if width:
                tokens = np.zeros((len(part), width), np.int64)
                for row, prompt in zip(tokens, part, strict=True):
                    row[: len(prompt)] = prompt
                positions = torch.arange(cache.prefix, cache.prefix + width, device=device)
                # Padding after a shorter prompt is overwritten before it is visible.
                self._forward(
                    torch.from_numpy(tokens).to(device),
                    positions.expand(len(part), -1),
                    AttentionContext(cache.prefix, positions, None),
                    cache,
                )
        cache.prompts = None

    def _step(self, cache: SlotCache, texts: list[_Text | None]) -> None:
        """Choose one more token for every response."""
        device = self.model.device
        live = {slot: text for slot, text in enumerate(texts) if text is not None}
        newest = torch.tensor([a.newest if a else 0 for a in texts], device=device)
        context = cache.context([a.position + 1 if a else 0 for a in texts])
        hidden = self._forward(newest[:, None], cache.positions[:, None], context, cache)[:, 0]
        cache.positions += 1
        # Responses with equal settings are sampled together; seeds only change the uniforms.
        groups: dict[SamplingConfig, list[int]] = {}
        for slot, text in live.items():
            groups.setdefault(replace(text.request.sampling, seed=0), []).append(slot)
        for sampling, group in groups.items():
            draws = None
            if not sampling.greedy:
                draws = np.concatenate([live[slot].draw() for slot in group])
            logits = self.model.logits(hidden[torch.tensor(group, device=device)])
            for slot, token in zip(group, choose(logits, sampling, draws), strict=True):
                live[slot].tokens.append(int(token))

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        context: Context,
        cache: SlotCache,
    ) -> Tensor:
        """(rows, n, hidden_size) inputs of the output head."""
        with attention_context(context):
            output = self.model.model.get_decoder()(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                **{self.model.cache_argument: cache},
            )
        hidden: Tensor = output.last_hidden_state
        return hidden


class _Text:
    """A request in progress."""

    def __init__(self, index: int, request: Request) -> None:
        self.index = index
        self.request = request
        self.tokens: list[int] = []

    @property
    def newest(self) -> int:
        return self.tokens[-1] if self.tokens else self.request.prompt_ids[-1]

    @property
    def position(self) -> int:
        """Position of the newest token."""
        return len(self.request.prompt_ids) + len(self.tokens) - 1

    def draw(self) -> np.ndarray:
        """(1,) the uniform that samples the next token."""
        return uniforms(self.request.sampling.seed, np.array([self.position + 1], np.int32))

    def ended(self, stop_token_ids: frozenset[int]) -> bool:
        return self.newest in stop_token_ids or len(self.tokens) == self.request.max_tokens


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    # All prompts lie between the first and the last in lexicographic order.
    first, last = min(prompts), max(prompts)
    differing = (n for n, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) == 2)
    return first[: next(differing, len(first))]
