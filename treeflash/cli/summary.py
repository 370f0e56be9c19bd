"""A summary of one generation: tokens, speed, accepted lengths, times."""

from __future__ import annotations

from treeflash.text.generation import Comparison, Generation

BAR_WIDTH = 40


def summarise(generation: Generation) -> str:
    """Several lines: tokens, speed, block efficiency, accepted lengths, time by phase."""
    forwards = len(generation.accepted_lengths)
    lines = [
        f"{len(generation.token_ids)} tokens after a prompt of {generation.prompt_tokens}, "
        f"{generation.tokens_per_s:.1f} tokens/s, "
        f"block efficiency {generation.block_efficiency:.2f} "
        f"({forwards} target forward{'s'[: forwards != 1]} after the prefill)",
        f"method {generation.method}, budget {generation.budget}, backend {generation.backend} on "
        f"{generation.device}, {generation.dtype}, seed {generation.seed}, "
        f"finish reason: {generation.finish_reason}",
        *_histogram(generation.histogram),
        "time: "
        + ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in generation.seconds.items()),
    ]
    if generation.compare is not None:
        lines += _comparison(generation.compare, generation)
    return "\n".join(lines)


def _histogram(histogram: dict[int, int]) -> list[str]:
    """One line per accepted length: how many iterations had it."""
    if not histogram:
        return []
    longest = max(histogram.values())
    return [
        "accepted length: iterations",
        *(
            f"{length:>15}: {'█' * max(1, round(BAR_WIDTH * count / longest))} {count}"
            for length, count in histogram.items()
        ),
    ]


def _comparison(comparison: Comparison, generation: Generation) -> list[str]:
    speedup = "unknown" if comparison.speedup is None else f"{comparison.speedup:.2f}x"
    return [
        f"compared with plain decoding: {_verdict(comparison, generation.dtype)}, "
        f"speedup {speedup}",
        "  (same loaded model, prompt and seed; tokens/s of the iterations, without prefill, "
        "both after a short warm-up)",
    ]


def _verdict(comparison: Comparison, dtype: str) -> str:
    if comparison.equal:
        return "equal"
    differ = f"the texts differ from new token {comparison.first_difference} on"
    if comparison.margin is None:
        return f"NOT EQUAL: {differ}"
    margin = (
        f"the margin between the best two logits there is {comparison.margin:.3g}, "
        f"the spacing of {dtype} {comparison.spacing:.3g}"
    )
    if comparison.near_tie:
        return f"{differ}, at a near-tie: {margin}"
    if dtype == "float32":
        return f"NOT EQUAL: {differ}; {margin}"
    return f"NOT EQUAL: {differ}; {margin}; check with --dtype float32"
