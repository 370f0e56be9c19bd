"""The section of docs/performance.md on throughput, made from the results beside the page."""

from __future__ import annotations

from typing import Any

from benchmarks.page import Row, cell, pick, table
from benchmarks.throughput.figures import RATIOS

NEXT = "## Budgets\n"
"""The section before which this one stands."""
SECTION = """## Throughput

Texts at once, through the scheduler: mean over five sets, greedy, budget `auto`. A group of
prompts is handed over at once and ends with its last text; tokens per second include the prefill.
Every system answers a group before the next group. `ratio to ar` compares tokens per second with
our plain decoding at the same concurrency, `ratio to padded` with transformers' padded `generate`,
`ratio to one` with the same system and one text at a time. `first token s` is the median, `p95` its
95th percentile.

<!-- throughput-goals -->
<!-- end -->

<!-- throughput -->
<!-- end -->

![Throughput by concurrency](performance/throughput.png)

What limits drafts of many texts on a CPU: its forward passes are bound by arithmetic from about 16
rows on. With 8 texts, an iteration without a draft took 23 ms, and one with trees of 3 to 4 nodes
52 ms, for 2.2 tokens per text. So drafts break even within an iteration, and lose what lies
outside: the drafter reads every prompt, and texts end at different times.

Skipped systems:

<!-- throughput-skipped -->
<!-- end -->

The time to the first token of a long prompt, of which a prefix cache holds 95 %:

<!-- throughput-prefix -->
<!-- end -->

"""


def with_section(page: str) -> str:
    """The page with this section, which is added if it is missing."""
    if "<!-- throughput -->" in page:
        return page
    before, found, after = page.partition(NEXT)
    assert found, f"the page has no {NEXT.strip()}"
    return f"{before}{SECTION}{found}{after}"


def blocks(found: dict[str, Any]) -> dict[str, str]:
    """The content of the section's marked blocks, by name.

    Args:
        found: results by name; those of MLX may be missing.
    """
    runs = [found[name] for name in ("throughput", "throughput-mlx") if name in found]
    rows, skipped, prefix = [], [], []
    for run in runs:
        where = {"backend": run["backend"], "dtype": run["dtype"]}
        means = [row for row in run["rows"] if row["set"] == "mean"]
        names = ("concurrency", "system", "method", "tokens_per_s", *RATIOS, "first_token_s")
        rows += [
            where | row | {"p95": mean["first_token_p95_s"]}
            for row, mean in zip(pick(means, *names), means, strict=True)
        ]
        skipped += [where | row for row in run["skipped"]]
        prefix.append(where | pick([run["prefix"]], *run["prefix"])[0])
    return {
        "throughput-goals": table(goal_rows(found["throughput"])),
        "throughput": table(rows),
        "throughput-skipped": table(skipped) if skipped else "None.",
        "throughput-prefix": table(prefix),
    }


def goal_rows(run: Row) -> list[Row]:
    """The goals of decoding many texts at once, and the measured values."""
    means = {
        (row["concurrency"], row["method"]): row for row in run["rows"] if row["set"] == "mean"
    }
    best = run["prefix"]["method"]

    def ratio(concurrency: int, name: str) -> float | None:
        row = means.get((concurrency, best))
        return row and row[name]

    at_any = [ratio(n, "ratio_to_ar") for n in dict.fromkeys(n for n, _ in means)]
    pays = [ratio(n, "ratio_to_ar") for n in (2, 4)]
    figures = (
        (f"`{best}`, auto / our plain decoding, lowest", "at least 0.97", _lowest(at_any)),
        ("the same with 2 and 4 texts, lowest", "at least 1.25", _lowest(pays)),
        ("8 texts at once / one at a time", "at least 2", ratio(8, "ratio_to_one")),
        ("8 texts / transformers' padded `generate`", "at least 1.5", ratio(8, "ratio_to_padded")),
        (
            f"first token with {run['prefix']['cached_tokens']} of "
            f"{run['prefix']['prompt_tokens']} prompt tokens cached / without a cache",
            "below 0.2",
            run["prefix"]["cached_to_whole"],
        ),
    )
    return [
        {
            "figure": figure,
            "goal": goal,
            "measured": "not measured" if value is None else cell(value),
        }
        for figure, goal, value in figures
    ]


def _lowest(ratios: list[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio is not None]
    return min(known) if len(known) == len(ratios) else None
