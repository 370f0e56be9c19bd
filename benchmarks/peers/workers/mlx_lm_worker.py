"""mlx-lm: `generate` and its speculative decoding."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load as load_folder
from mlx_lm import stream_generate
from serve import NO_ASSISTANT, answer, describe, serve


def load(setup: dict[str, Any]) -> tuple[dict, Any]:
    """Load the target and the assistant, if given."""
    if setup["device"] == "cpu":
        mx.set_default_device(mx.cpu)

    def load_model(folder: str) -> tuple[Any, Any]:
        model, tokenizer = load_folder(folder)
        if setup["dtype"] is not None:  # else as in the files
            model.set_dtype(getattr(mx, setup["dtype"]))
        mx.eval(model.parameters())
        return model, tokenizer

    model, tokenizer = load_model(setup["target"])
    tokenizer.eos_token_ids = setup["stop_token_ids"]
    options: dict[str, dict[str, Any]] = {"generate": {}}
    skipped = {"speculative": NO_ASSISTANT}
    if setup["assistant"]:
        options["speculative"] = {"draft_model": load_model(setup["assistant"])[0]}
        skipped = {}

    def decode(prompt_ids: list[int], method: str, budget: object, max_tokens: int) -> dict:
        token_ids, drafted, times = [], [], []
        for part in stream_generate(
            model, tokenizer, prompt_ids, max_tokens=max_tokens, **options[method]
        ):
            token_ids.append(part.token)
            drafted.append(part.from_draft)
            times.append(time.perf_counter())
        # A forward pass ends with the target's own token, unless the limit comes first.
        ends = [i for i, draft in enumerate(drafted) if not draft or i == len(drafted) - 1]
        seconds = times[-1] - times[ends[0]]
        return answer(token_ids, len(token_ids) - ends[0] - 1, len(ends) - 1, seconds)

    device = mx.default_device().type
    dtype = next(x.dtype for _, x in tree_flatten(model.parameters()) if x.dtype != mx.uint32)
    return describe(list(options), device, dtype, ("mlx-lm", "mlx"), skipped), decode


if __name__ == "__main__":
    serve(load)
