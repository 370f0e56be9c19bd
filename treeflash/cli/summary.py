"""The figures of one generation, for people."""

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
        f"finished by {generation.finish_reason}",
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
    if comparison.equal:
        verdict = "equal"
    else:
        verdict = f"NOT EQUAL: the texts differ from new token {comparison.first_difference} on"
        if generation.dtype != "float32":
            verdict += (
                f"; in {generation.dtype} rounding can flip a near-tie, "
                "--dtype float32 tells whether it did"
            )
    return [
        f"compared with plain decoding: {verdict}, speedup {speedup}",
        "  (same loaded model, prompt and seed; tokens/s of the iterations, without prefill, "
        "both after a short warm-up)",
    ]
