"""treeflash itself, with every method that the pair supports."""

from __future__ import annotations

from typing import Any

from serve import Answers, describe, serve

import treeflash
from treeflash.config import AUTO, METHODS, DecodeConfig
from treeflash.decoding import Request, SchedulerConfig, check
from treeflash.errors import TreeflashError

PACKAGES = {"cuda": ("torch", "transformers"), "mlx": ("mlx", "mlx-lm")}


def load(setup: dict[str, Any]) -> tuple[dict, Any]:
    """Load the pair."""
    name, settings = setup["backend"], {"bits": setup["bits"]}
    target = setup["name"] if name == "cuda" else setup["target"]
    if name == "cuda":
        import torch

        usual = "cuda" if torch.cuda.is_available() else "cpu"
        settings["device"] = setup["device"] or usual
    if setup["dtype"] != AUTO:
        settings["dtype"] = setup["dtype"]
    model = treeflash.load(target, setup["drafter"] or False, backend=name, **settings)
    backend, skipped = model.backend, {}
    for method in METHODS:
        try:
            check(backend, Request(prompt_ids=(0,), config=DecodeConfig(method=method)))
        except TreeflashError as error:
            skipped[method] = str(error)
    methods = [method for method in METHODS if method not in skipped]

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
    packages = ("treeflash", *PACKAGES.get(name, ()))
    return describe(methods, device, backend.dtype, packages, skipped), decode


if __name__ == "__main__":
    serve(load)
