"""treeflash itself, with every method that the pair supports."""

from __future__ import annotations

import time
from typing import Any

from serve import answer, describe, serve

import treeflash
from treeflash.config import AUTO, METHODS

PACKAGES = {"cuda": ("treeflash", "torch", "transformers"), "mlx": ("treeflash", "mlx", "mlx-lm")}


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

    def decode(prompt_ids: list[int], method: Any, budget: Any, max_tokens: int) -> dict:
        options = {} if budget is None else {"budget": budget}
        stream = model.stream(prompt_ids, method=method, max_tokens=max_tokens, **options)
        next(stream)  # the token of the prefill
        start = time.process_time()
        result = stream.run()
        spent = time.process_time() - start
        lengths = result.accepted_lengths
        return answer(result.token_ids, sum(lengths), len(lengths), result.decode_s, spent)

    device = "cpu" if backend.device == "cpu" else backend.device_name
    return describe(methods, device, backend.dtype, PACKAGES[name]), decode


if __name__ == "__main__":
    serve(load)
