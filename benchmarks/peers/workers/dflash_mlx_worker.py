"""dflash-mlx: DFlash for MLX, with its own defaults, which include prompt lookup."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from dflash_mlx.engine.events import SummaryEvent
from dflash_mlx.runtime import stream_dflash_generate
from dflash_mlx.runtime.bundle import load_runtime_bundle
from dflash_mlx.runtime.context import build_offline_runtime_context
from serve import answer, describe, serve


def load(setup: dict[str, Any]) -> tuple[dict, Any]:
    """Load the pair; the drafter without its AR head."""
    dtype = getattr(mx, setup["dtype"])
    context = build_offline_runtime_context()
    bundle = load_runtime_bundle(
        model_ref=setup["target"],
        draft_ref=setup["dflash_drafter"],
        draft_quant="none",
        verify_config=context.verify,
    )
    for model in (bundle.target_model, bundle.draft_model):
        model.set_dtype(dtype)
        mx.eval(model.parameters())

    def decode(prompt_ids: list[int], method: str, budget: object, max_tokens: int) -> dict:
        events = stream_dflash_generate(
            target_model=bundle.target_model,
            target_ops=bundle.target_ops,
            tokenizer=bundle.tokenizer,
            draft_model=bundle.draft_model,
            draft_backend=bundle.draft_backend,
            prompt_tokens_override=prompt_ids,
            max_new_tokens=max_tokens,
            stop_token_ids=setup["stop_token_ids"],
            runtime_context=context,
        )
        (summary,) = (event for event in events if isinstance(event, SummaryEvent))
        token_ids = list(summary.generated_token_ids)
        seconds = (summary.elapsed_us - summary.phase_timings_us["prefill"]) / 1e6
        return answer(token_ids, len(token_ids) - 1, summary.cycles_completed, seconds)

    device = mx.default_device().type
    return describe(["dflash"], device, dtype, ("dflash-mlx", "mlx-lm", "mlx")), decode


if __name__ == "__main__":
    serve(load)
