"""transformers: `generate` and its two ways to draft."""

from __future__ import annotations

import time
from typing import Any

import torch
from serve import NO_ASSISTANT, answer, describe, serve
from torch import Tensor
from torch_target import load_model
from transformers.generation.streamers import BaseStreamer

LOOKUP_TOKENS = 10  # as in the documentation of transformers


class Clock(BaseStreamer):
    """Records the number and the time of arriving tokens: the prompt, then each forward pass."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with the tokens of a forward pass."""
        self.lengths.append(value.numel())
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last tokens."""


def load(setup: dict[str, Any]) -> tuple[dict, Any]:
    """Load the target and the assistant, if given."""
    model = load_model(setup["target"], setup)
    options: dict[str, dict[str, Any]] = {
        "generate": {},
        "prompt-lookup": {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
    }
    skipped = {"assisted": NO_ASSISTANT}
    if setup["assistant"]:
        options["assisted"] = {"assistant_model": load_model(setup["assistant"], setup)}
        skipped = {}

    def decode(prompt_ids: list[int], method: str, budget: object, max_tokens: int) -> dict:
        prompt = torch.tensor([prompt_ids], device=model.device)
        clock = Clock()
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_tokens,
            streamer=clock,
            **options[method],
        )
        token_ids = output[0, len(prompt_ids) :].tolist()
        seconds = time.perf_counter() - clock.times[1]
        lengths = clock.lengths[2:]
        return answer(token_ids, sum(lengths), len(lengths), seconds)

    packages = ("transformers", "torch")
    return describe(list(options), model.device, model.dtype, packages, skipped), decode


if __name__ == "__main__":
    serve(load)
