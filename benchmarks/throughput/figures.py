"""The rows of the throughput benchmark, from its records, and their plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import mean_row
from benchmarks.throughput.systems import Answer

PLAIN, PADDED = ("treeflash", "ar"), ("transformers", "generate")
CASE = ("concurrency", "system", "method")
RATIOS = ("ratio_to_ar", "ratio_to_padded", "ratio_to_one")
FIGURES = ("tokens_per_s", "first_token_s", "first_token_p95_s", *RATIOS)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Prompts that a system answered at once.

    Attributes:
        set_name: of the prompts.
        concurrency: how many prompts.
        system: with `method`, who answered.
        group: numbers the prompts of the set at this concurrency.
        answers: one for each prompt.
    """

    set_name: str
    concurrency: int
    system: str
    method: str
    group: int
    answers: list[Answer]

    @property
    def tokens(self) -> int:
        """New tokens of all texts."""
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def seconds(self) -> float:
        """From handing over the prompts to the last token."""
        return max(answer.last_s for answer in self.answers)


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row for each set, concurrency and system, and one for the mean over sets.

    `first_token_s` is a median. Ratios compare tokens per second: `ratio_to_ar` with our plain
    decoding and `ratio_to_padded` with transformers' padded `generate` at the same concurrency,
    `ratio_to_one` with the same system and one text at a time. `equal` counts the texts with the
    same tokens as our plain decoding at this concurrency.
    """
    cells: dict[tuple, list[Record]] = {}
    for x in records:
        cells.setdefault((x.set_name, x.concurrency, x.system, x.method), []).append(x)
    speeds = {
        key: sum(x.tokens for x in of) / sum(x.seconds for x in of) for key, of in cells.items()
    }
    found = []
    for key, own in cells.items():
        name, concurrency, system, method = key

        def ratio(*base: Any, speed: float = speeds[key]) -> float | None:
            return speed / speeds[base] if base in speeds else None

        plain = cells.get((name, concurrency, *PLAIN), [])
        firsts = [answer.first_s for x in own for answer in x.answers]
        found.append(
            {"set": name, "concurrency": concurrency, "system": system, "method": method}
            | {
                "tokens_per_s": speeds[key],
                "first_token_s": float(np.median(firsts)),
                "first_token_p95_s": float(np.quantile(firsts, 0.95)),
                "ratio_to_ar": ratio(name, concurrency, *PLAIN),
                "ratio_to_padded": ratio(name, concurrency, *PADDED),
                "ratio_to_one": ratio(name, 1, system, method),
                "prompts": len(firsts),
                "equal": _equal(own, plain) if plain else None,
            }
        )
    cases = dict.fromkeys(tuple(row[key] for key in CASE) for row in found)
    return found + [_mean(found, dict(zip(CASE, case, strict=True))) for case in cases]


def _equal(own: Sequence[Record], plain: Sequence[Record]) -> int:
    texts = {(x.group, i): a.token_ids for x in plain for i, a in enumerate(x.answers)}
    return sum(texts[x.group, i] == a.token_ids for x in own for i, a in enumerate(x.answers))


def _mean(found: list[dict[str, Any]], case: dict[str, Any]) -> dict[str, Any]:
    own = [row for row in found if case.items() <= row.items()]
    known = tuple(name for name in FIGURES if all(row[name] is not None for row in own))
    mean = mean_row(own, case, known)
    equal = None if own[0]["equal"] is None else sum(row["equal"] for row in own)
    return {name: mean.get(name) for name in own[0]} | {"equal": equal}


def draw(found: Sequence[dict[str, Any]], caption: str, path: Path) -> None:
    """Plot tokens per second and the time to the first token by concurrency, means over sets."""
    from matplotlib.figure import Figure

    means = [row for row in found if row["set"] == "mean"]
    systems = dict.fromkeys((row["system"], row["method"]) for row in means)
    figure = Figure(figsize=(10, 4.5), dpi=110, layout="constrained")
    for axis, name, label in zip(
        figure.subplots(1, 2),
        ("tokens_per_s", "first_token_s"),
        ("tokens per second", "median time to the first token, s"),
        strict=True,
    ):
        for system in systems:
            own = [row for row in means if (row["system"], row["method"]) == system]
            style = "-" if system[0] == "treeflash" else "--"
            x, y = [row["concurrency"] for row in own], [row[name] for row in own]
            axis.plot(x, y, style, marker="o", markersize=3, label=" ".join(system))
        ticks = sorted({row["concurrency"] for row in means})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, ticks)
        axis.set(xlabel="texts at once", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.suptitle(caption, fontsize="small")
    figure.savefig(path)
