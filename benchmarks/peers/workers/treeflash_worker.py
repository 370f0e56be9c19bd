"""treeflash itself, with every method that the pair supports."""

from __future__ import annotations

from typing import Any

from serve import Answers, describe, serve

import treeflash
from treeflash.config import AUTO, METHODS
from treeflash.decoding import Request, SchedulerConfig

PACKAGES = {"cuda": ("torch", "transformers"), "mlx": ("mlx", "mlx-lm")}


def load(setup: dict[str, Any]) -> tuple[dict, Any]:
    """Load the pair."""
    name, device = setup["backend"], setup["device"]
    if name == "cuda" and device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    target = setup["name"] if name == "cuda" else setup["target"]
    settings = {"backend": name, "device": device if name == "cuda" else None}
    if setup["dtype"] != AUTO:
        settings["dtype"] = setup["dtype"]
    if setup["bits"] is not None:
        settings["bits"] = setup["bits"]
    model = treeflash.load(target, setup["drafter"] or False, **settings)
    backend = model.backend
    methods = [m for m in METHODS if backend.head is not None or not m.startswith("treeflash")]
    if backend.drafter is None:
        methods = ["ar", "suffix"]

    def decode(prompts: list[list[int]], method: Any, budget: Any, max_tokens: int) -> dict:
        options = {} if budget is None else {"budget": budget}
        config = model.decode_config({"method": method, "max_tokens": max_tokens, **options})
        scheduler = model.scheduler(SchedulerConfig(max_parallel=len(prompts)), None)
        requests = [Request(prompt_ids=x, config=config, tag=n) for n, x in enumerate(prompts)]
        answers, forwards = Answers(len(prompts)), -1  # the prefill
        for request, step in scheduler.decode(requests):
            answers.add(request.tag, step.tokens)
            forwards += 1
        return answers.reply(forwards)

    device = "cpu" if backend.device == "cpu" else backend.device_name
    skipped = {x: "the pair cannot draft for it" for x in METHODS if x not in methods}
    packages = ("treeflash", *PACKAGES.get(name, ()))
    return describe(methods, device, backend.dtype, packages, skipped), decode


if __name__ == "__main__":
    serve(load)
