"""Render the tables of docs/performance.md from the results beside it."""

from __future__ import annotations

from typing import Any

from treeflash.errors import ConfigError

Row = dict[str, Any]


def cell(value: Any) -> str:
    """Format a value as the page shows it."""
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def table(rows: list[Row]) -> str:
    """A Markdown table of rows; the keys of the first row are the columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in r.values()] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_set(rows: list[Row], case: tuple[str, ...], figure: str) -> str:
    """A table with one line for each case and one column for each set."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    lines: dict[tuple, Row] = {}
    for row in rows:
        name = {key.replace("_", " "): row[key] for key in case}
        line = lines.setdefault(tuple(name.values()), name | dict.fromkeys(sets))
        line[row["set"]] = row[figure]
    return table(list(lines.values()))


def pick(rows: list[Row], *names: str) -> list[Row]:
    """The named columns of rows."""
    return [{name.replace("_", " "): row[name] for name in names} for row in rows]


def mean_speed(rows: list[Row], system: str, method: str) -> float:
    """Tokens per second, mean over sets."""
    found = [r for r in rows if (r["set"], r["system"], r["method"]) == ("mean", system, method)]
    return float(found[0]["tokens_per_s"])


def replay_rows(rows: list[Row]) -> list[Row]:
    """One line for each setting of the AR head, with its change against the published head."""
    means = [row for row in rows if row["set"] == "mean"]
    full = [row for row in means if row["head_vocab"] == row["head_rows"] == "full"]
    whole = {row["budget"]: row["block_efficiency"] for row in full}
    lines: dict[tuple, Row] = {}
    for row in means:
        setting = {"tokens": row["head_vocab"], "rows": row["head_rows"]}
        line = lines.setdefault(tuple(setting.values()), setting)
        line["ms"] = row["table_ms"]  # the last row has the largest budget
        value, change = row["block_efficiency"], row["block_efficiency"] / whole[row["budget"]] - 1
        line[f"{row['budget']} nodes"] = f"{value:.2f} ({100 * change:+.1f} %)"
    return list(lines.values())


def auto_rows(rows: list[Row]) -> list[Row]:
    """One line for each method: per set, the best fixed budget and the difference of `auto`."""
    lines: dict[str, Row] = {}
    for row in rows:
        line = lines.setdefault(row["method"], {"method": row["method"]})
        ratios = (row[name] for name in ("auto_to_best", "low", "high"))
        change, low, high = (f"{100 * (ratio - 1):+.1f}" for ratio in ratios)
        line[row["set"]] = f"{row['best']}: {change} % ({low} to {high})"
    return list(lines.values())


def quantised_rows(whole: Row, quantised: Row) -> list[Row]:
    """Time of a target forward pass on MLX by nodes, unquantised and in 4 bits."""
    return [
        {"nodes": row["nodes"], f"{whole['dtype']}, ms": row["verify_ms"]}
        | {"4 bits, ms": other["verify_ms"]}
        for row, other in zip(whole["verify"], quantised["verify"], strict=True)
    ]


def goal_rows(goals: list[Row], mlx: list[Row], phases: list[Row]) -> list[Row]:
    """The project's goals and the measured values."""
    auto, plain = (mean_speed(goals, "treeflash", method) for method in ("treeflash", "ar"))
    theirs = mean_speed(goals, "transformers", "generate")
    outside = [r["outside"] for r in phases if (r["method"], r["budget"]) == ("treeflash", 64)]
    figures = {
        "`treeflash`, auto / transformers' `generate`": (2.5, auto / theirs),
        "`treeflash`, auto / our plain decoding": (1.6, auto / plain),
        "our plain decoding / transformers' `generate`": (1.3, plain / theirs),
        "MLX: `treeflash`, auto / mlx-lm's `generate`": (
            1.5,
            mean_speed(mlx, "treeflash", "treeflash") / mean_speed(mlx, "mlx-lm", "generate"),
        ),
    }
    rows = [
        {"figure": name, "goal": f"at least {goal}", "measured": value}
        for name, (goal, value) in figures.items()
    ]
    share = {"figure": "time outside forward passes, 64 nodes", "goal": "at most 3 %"}
    return [*rows, share | {"measured": f"{100 * outside[0]:.1f} %"}]


def blocks(found: dict[str, Any]) -> dict[str, str]:
    """The content of the page's marked blocks, by name."""
    iteration = found["iteration"]
    case = ("system", "method", "budget", "backend", "dtype")
    machine = found["iteration"]["machine"]
    versions = ", ".join(" ".join(pair) for pair in machine["versions"].items())
    peers = [r for r in found["peers"]["rows"] if r["set"] == "mean"]
    return {
        "machine": f"{machine['date']}: {machine['cpu']}, {machine['cores']} cores, {versions}.",
        "goals": table(
            goal_rows(found["goals"]["rows"], found["goals-mlx"]["rows"], iteration["phases"])
        ),
        "goals-by-set": by_set(
            found["goals"]["rows"] + found["goals-mlx"]["rows"],
            ("system", "method", "backend"),
            "tokens_per_s",
        ),
        "peers": table(pick(peers, *case, "tokens_per_s", "block_efficiency", "ratio_to_generate")),
        "skipped": table(found["peers"]["skipped"]),
        "budgets": by_set(found["budgets"]["rows"], ("method", "budget"), "ratio_to_ar"),
        "auto": table(auto_rows(found["budgets"]["auto"])),
        "random": by_set(found["random"]["rows"], ("method", "budget"), "ratio_to_ar"),
        "replay": table(replay_rows(found["replay"]["rows"])),
        "head": table(found["head"]["rows"] + found["head-mlx"]["rows"]),
        "phases": table(
            [
                {"backend": on["backend"], "dtype": on["dtype"], **row}
                for on in (iteration, found["iteration-mlx"])
                for row in on["phases"]
            ]
        ),
        "quantised": table(quantised_rows(found["iteration-mlx"], found["quantised"])),
        **{name: table(iteration[name]) for name in ("sampling", "prefill")},
        "memory": table(found["memory"]["rows"]),
    }


def render(page: str, shown: dict[str, str]) -> str:
    """The page with the content of its marked blocks replaced.

    Args:
        page: Markdown with blocks `<!-- name -->` ... `<!-- end -->`.
        shown: the new content, by name.

    Raises:
        ConfigError: a mark is missing.
    """
    for name, text in shown.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = page.partition(start)
        if not found:
            raise ConfigError(f"the page has no block {name}: {start.strip()} ... {end}")
        page = f"{before}{start}{text}\n{end}{rest.partition(end)[2]}"
    return page
