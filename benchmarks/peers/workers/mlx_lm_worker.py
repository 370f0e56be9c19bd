"""mlx-lm: `generate`, one prompt after the other, and `BatchGenerator` for all at once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load as load_folder
from mlx_lm import stream_generate
from mlx_lm.generate import BatchGenerator
from serve import Answers, describe, serve


def load(setup: dict[str, Any]) -> tuple[dict, Any]:
    """Load the target."""
    if setup["device"] == "cpu":
        mx.set_default_device(mx.cpu)

    model, tokenizer = load_folder(setup["target"])[:2]
    if setup["dtype"] != "auto":  # else as in the files
        model.set_dtype(getattr(mx, setup["dtype"]))
    mx.eval(model.parameters())
    tokenizer.eos_token_ids = setup["stop_token_ids"]

    def generate(answers: Answers, prompts: list[list[int]], max_tokens: int) -> None:
        for number, prompt_ids in enumerate(prompts):
            for part in stream_generate(model, tokenizer, prompt_ids, max_tokens=max_tokens):
                answers.add(number, [part.token])

    def batch_generate(answers: Answers, prompts: list[list[int]], max_tokens: int) -> None:
        generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in setup["stop_token_ids"]],
            completion_batch_size=len(prompts),
            prefill_batch_size=len(prompts),
        )
        uids = generator.insert(prompts, [max_tokens] * len(prompts))
        numbers = {uid: number for number, uid in enumerate(uids)}
        while responses := generator.next_generated():
            for response in responses:
                answers.add(numbers[response.uid], [response.token])
        generator.close()

    methods = {"generate": generate, "batch_generate": batch_generate}

    def decode(prompts: list[list[int]], method: str, budget: object, max_tokens: int) -> dict:
        answers = Answers(len(prompts))
        methods[method](answers, prompts, max_tokens)
        return answers.reply(max(map(len, answers.token_ids)) - 1)

    device = mx.default_device().type
    dtype = next(x.dtype for _, x in tree_flatten(model.parameters()) if x.dtype != mx.uint32)
    return describe(list(methods), device, dtype, ("mlx-lm", "mlx")), decode


if __name__ == "__main__":
    serve(load)
