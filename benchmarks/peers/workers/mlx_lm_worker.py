"""mlx-lm: `generate`."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load as load_folder
from mlx_lm import stream_generate
from serve import answer, describe, serve


def load(setup: dict[str, Any]) -> tuple[dict, Any]:
    """Load the target."""
    if setup["device"] == "cpu":
        mx.set_default_device(mx.cpu)

    model, tokenizer = load_folder(setup["target"])
    if setup["dtype"] is not None:  # else as in the files
        model.set_dtype(getattr(mx, setup["dtype"]))
    mx.eval(model.parameters())
    tokenizer.eos_token_ids = setup["stop_token_ids"]

    def decode(prompt_ids: list[int], method: str, budget: object, max_tokens: int) -> dict:
        token_ids, times = [], []
        for part in stream_generate(model, tokenizer, prompt_ids, max_tokens=max_tokens):
            token_ids.append(part.token)
            times.append(time.perf_counter())
        tokens = len(token_ids) - 1
        return answer(token_ids, tokens, tokens, times[-1] - times[0])

    device = mx.default_device().type
    dtype = next(x.dtype for _, x in tree_flatten(model.parameters()) if x.dtype != mx.uint32)
    return describe(["generate"], device, dtype, ("mlx-lm", "mlx")), decode


if __name__ == "__main__":
    serve(load)
