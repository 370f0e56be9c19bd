"""flashspec: prompt lookup and, given an assistant, its default mix of both."""

from __future__ import annotations

from typing import Any

import torch
from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
from flashspec.engine import HuggingFaceDrafter, NgramDrafter, TargetModel
from serve import NO_ASSISTANT, answer, describe, serve
from torch_target import load_model


def load(setup: dict[str, Any]) -> tuple[dict, Any]:
    """Load the target and the assistant, if given; make an engine for each method."""
    model = load_model(setup["target"], setup)
    device, dtype = model.device, model.dtype

    def engine(drafter: Any, **strategy: Any) -> SpeculativeEngine:
        config = FlashSpecConfig(
            device=str(device),
            dtype=setup["dtype"],
            eos_token_ids=tuple(setup["stop_token_ids"]),
            sampling=SamplingConfig(temperature=0.0),
            **strategy,
        )
        target = TargetModel(setup["target"], device, dtype, model=model)
        return SpeculativeEngine(config, [drafter], target)

    one_drafter = {"drafter_strategy": "bandit", "bandit": BanditConfig(n_arms=1)}
    engines = {"prompt-lookup": engine(NgramDrafter(), **one_drafter)}
    skipped = {"assisted": NO_ASSISTANT}
    if setup["assistant"]:
        assistant = load_model(setup["assistant"], setup)
        drafter = HuggingFaceDrafter(setup["assistant"], device, dtype, model=assistant)
        engines["assisted"] = engine(drafter)
        skipped = {}

    def decode(prompt_ids: list[int], method: str, budget: object, max_tokens: int) -> dict:
        prompt = torch.tensor([prompt_ids], device=device)
        result = engines[method].generate(prompt, max_new_tokens=max_tokens)
        token_ids = result.output_ids[0, : result.n_tokens_generated].tolist()
        # The first step includes the prefill.
        steps = result.arm_steps[1:]
        tokens = sum(step.emitted for step in steps)
        return answer(token_ids, tokens, len(steps), sum(step.seconds for step in steps))

    packages = ("flashspec", "transformers", "torch")
    return describe(list(engines), device, dtype, packages, skipped), decode


if __name__ == "__main__":
    serve(load)
