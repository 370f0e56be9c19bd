"""dflash, the DFlash authors' package, on PyTorch."""

from __future__ import annotations

import time
from typing import Any

import torch
from dflash import DFlashDraftModel
from dflash.model import dflash_generate
from serve import answer, describe, serve
from torch_target import load_model


class Clock:
    """Counts the target's forward passes and records when the prefill ended."""

    def __init__(self, target: Any) -> None:
        self.forwards = 0
        self.prefilled = 0.0
        target.register_forward_hook(self._count)

    def _count(self, target: Any, *_: Any) -> None:
        if self.forwards == 0:
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            self.prefilled = time.perf_counter()
        self.forwards += 1


def load(setup: dict[str, Any]) -> tuple[dict, Any]:
    """Load the pair; the drafter without its AR head."""
    target = load_model(setup["target"], setup)
    drafter = DFlashDraftModel.from_pretrained(setup["dflash_drafter"], dtype=target.dtype)
    drafter = drafter.to(target.device).eval()
    clock = Clock(target)

    def decode(prompt_ids: list[int], method: str, budget: object, max_tokens: int) -> dict:
        prompt = torch.tensor([prompt_ids], device=target.device)
        clock.forwards = 0
        output = dflash_generate(drafter, target, prompt, max_tokens, setup["stop_token_ids"])
        token_ids = output[0, len(prompt_ids) :].tolist()
        seconds = time.perf_counter() - clock.prefilled
        return answer(token_ids, len(token_ids) - 1, clock.forwards - 1, seconds)

    packages = ("dflash", "transformers", "torch")
    return describe(["dflash"], target.device, target.dtype, packages), decode


if __name__ == "__main__":
    serve(load)
