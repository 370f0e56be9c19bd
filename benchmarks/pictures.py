"""The pictures of README: a draft tree, tokens per second by method, and a recording.

    python -m benchmarks.pictures run.json --backend cuda --device cpu --bits 16 [--record]

It draws `docs/pictures` for light and dark themes: the tree and the recording from run.json, which
`--record` measures before, the speeds from `docs/performance/results.json`. Another run changes
nothing but seconds and tokens per second: trees have a fixed budget, because `auto` would depend on
how fast the machine is.
"""

from __future__ import annotations

import io
import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from benchmarks.common import ROOT, Parser, command, describe, write_json
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import Method
from treeflash.decoding.tree import DraftTree
from treeflash.evaluation.records import MEAN
from treeflash.language_model import LanguageModel

PICTURES = ROOT / "docs" / "pictures"
RESULTS = ROOT / "docs" / "performance" / "results.json"
QUESTION = "Write a Python function that checks whether a number is even."
PROMPTS = (
    "Write a Python class for a bank account with the methods deposit, withdraw and balance.",
    QUESTION,
)
"""Questions that are recorded; together their answers take about ten seconds to write."""
SPEEDS = {
    ("transformers", "generate"): "transformers",
    ("transformers", "treeflash"): "transformers, with treeflash's drafts",
    ("llama.cpp", "generate"): "llama.cpp",
    ("treeflash", "ar"): "treeflash, without drafts",
    ("treeflash", "treeflash"): "treeflash",
}
"""Systems and methods whose speeds are drawn."""
RECORDED: tuple[Method, ...] = ("ar", "treeflash")
TITLES = {"ar": "without drafts", "treeflash": "with drafts"}
CHARACTER = 7.8
"""Width of a character of the pictures' font, in pixels."""
LINE = 18
"""Height of a line of a recording, in pixels."""
FRAMES = 20
"""Moments of a second at which a recording shows something new."""
PAUSE = 3.0
"""Seconds for which a recording shows the whole texts before it begins again."""
TREE_BUDGET = 16
"""Nodes of drawn trees."""


class Theme(NamedTuple):
    """The colours of a picture, as CSS writes them."""

    name: str
    text: str
    faint: str
    line: str
    surface: str
    accent: str
    plain: str


THEMES = (
    Theme("light", "#1f2328", "#656d76", "#d0d7de", "#f6f8fa", "#1a7f37", "#8c959f"),
    Theme("dark", "#e6edf3", "#8d96a0", "#3d444d", "#151b23", "#3fb950", "#6e7681"),
)


def record(model: LanguageModel, prompts: Sequence[str], max_tokens: int) -> dict[str, Any]:
    """Answer prompts one after the other without and with drafts; keep texts and draft trees.

    Each text has `chunks`, pairs of seconds since the start and text, and `tokens`, the number of
    tokens of its answers. Each of the `steps` has the strings of a tree's nodes, their parents and
    the accepted path.
    """
    texts = {}
    for method in RECORDED:
        model.generate(prompts[0], method=method, max_tokens=8)
        chunks: list[tuple[float, str]] = []
        tokens, start = 0, time.perf_counter()
        for prompt in prompts:
            gap = "\n\n" if chunks else ""
            chunks.append((round(time.perf_counter() - start, 3), f"{gap}> {prompt}\n\n"))
            for chunk in model.stream(prompt, method=method, max_tokens=max_tokens):
                chunks.append((round(time.perf_counter() - start, 3), chunk.text))
                tokens += len(chunk.token_ids)
        texts[method] = {"chunks": chunks, "tokens": tokens}
    steps = []
    for chunk in model.stream(prompts[0], method="treeflash", budget=TREE_BUDGET, max_tokens=150):
        tree, path = chunk.step.tree, chunk.step.path
        if tree is not None and path is not None and len(tree.tokens) > 1:
            nodes = [model.tokenizer.decode([token]) for token in tree.tokens.tolist()]
            steps.append({"nodes": nodes, "parents": tree.parents.tolist(), "path": path.tolist()})
    return {"prompts": list(prompts), "texts": texts, "steps": steps}


def best_step(steps: Sequence[dict[str, Any]], depths: int = 8) -> dict[str, Any]:
    """Return the step whose tree shows most: an accepted path that turns, words, and branches.

    A tree deeper than `depths` is too wide for a page, and comes last.
    """

    def shows(step: dict[str, Any]) -> tuple[bool, bool, int, int, int]:
        parents, path = step["parents"], step["path"]
        # The most probable child of a node is its first one.
        first = {parent: child for child, parent in reversed([*enumerate(parents)])}
        turns = sum(first[parents[node]] != node for node in path[1:])
        words = sum(any(map(str.isalpha, step["nodes"][node])) for node in path)
        branches = sum(parents.count(parent) > 1 for parent in set(parents))
        return max(depths_of(parents)) <= depths, turns > 0, words, branches, len(path)

    return max(steps, key=shows)


def depths_of(parents: Sequence[int]) -> list[int]:
    """Return the depth of each node; parents come before children, and the root has -1."""
    return DraftTree.from_parents(
        np.zeros(len(parents), np.int32), np.array(parents)
    ).depths.tolist()


def places(parents: Sequence[int]) -> list[float]:
    """Return the row of each node: leaves have rows of their own, a parent its first child's."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    rows = [0.0] * len(parents)

    def place(node: int, row: int) -> int:
        rows[node] = row
        for child in children.get(node, ()):
            row = place(child, row)
        return row if node in children else row + 1

    place(0, 0)
    return rows


def shown(token: str) -> str:
    """Return what stands in the box of a token."""
    if not token:
        return "end"
    return token.strip() or ("↵" if "\n" in token else "␣")


def svg(width: float, height: float, theme: Theme, body: str, style: str = "") -> str:
    """Return a picture whose text is monospaced."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-size="13" fill="{theme.text}" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace">'
        f"<style>{style}</style>{body}</svg>\n"
    )


def draw_tree(step: dict[str, Any], theme: Theme) -> str:
    """Draw the tree of a step, from left to right, with the accepted path in the accent colour."""
    parents, path = step["parents"], set(step["path"])
    labels = [shown(node) for node in step["nodes"]]
    depths, rows = depths_of(parents), places(parents)
    widths = [len(label) * CHARACTER + 18 for label in labels]
    columns: list[float] = [0] * (max(depths) + 1)
    for depth, width in zip(depths, widths, strict=True):
        columns[depth] = max(columns[depth], width)
    lefts = [1.0, *accumulate((width + 26 for width in columns), initial=1)][1:]
    body = ""
    for node, parent in enumerate(parents):
        x, y = lefts[depths[node]], rows[node] * 30 + 2
        edge, colour = (theme.accent, theme.text) if node in path else (theme.line, theme.faint)
        if parent >= 0:
            right, middle = lefts[depths[parent]] + widths[parent], rows[parent] * 30 + 14
            body += (
                f'<path d="M{right:.0f} {middle:.0f} C{x - 12:.0f} {middle:.0f} {x - 18:.0f} '
                f'{y + 12:.0f} {x:.0f} {y + 12:.0f}" fill="none" stroke="{edge}" '
                f'stroke-width="{2 if node in path else 1}"/>'
            )
        body += (
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{widths[node]:.0f}" height="24" rx="6" '
            f'fill="{theme.surface}" stroke="{edge}"/><text x="{x + 9:.0f}" y="{y + 16:.0f}" '
            f'fill="{colour}">{escape(labels[node])}</text>'
        )
    return svg(lefts[-1] - 24, max(rows) * 30 + 28, theme, body)


def draw_speeds(results: dict[str, Any], theme: Theme) -> str:
    """Draw the mean tokens per second of each system and method of `benchmarks.peers`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    means = [row for row in results["systems"]["rows"] if row["set"] == MEAN]
    by_case = {(row["system"], row["method"]): row for row in means}
    rows = [by_case[case] for case in SPEEDS if case in by_case]
    labels = [SPEEDS[row["system"], row["method"]] for row in rows]
    speeds = [row["tokens_per_s"] for row in rows]
    drafts = [row["method"] not in ("generate", "ar") for row in rows]
    # Text stays text, and names of parts do not depend on the process.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "treeflash"}):
        figure = Figure(figsize=(7.2, 0.3 + 0.42 * len(rows)), layout="constrained")
        axis = figure.subplots()
        bars = axis.barh(labels, speeds, color=[theme.accent if d else theme.plain for d in drafts])
        axis.bar_label(bars, fmt="%.0f tokens/s", padding=4, color=theme.text)
        axis.invert_yaxis()
        axis.set_xlim(0, max(speeds) * 1.25)
        axis.xaxis.set_visible(False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0, colors=theme.text, labelsize=11)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def lines_of(chunks: Sequence[tuple[float, str]], width: int) -> Iterator[list[tuple[float, str]]]:
    """Yield lines of at most `width` characters, as parts with the seconds at which they appear."""
    text = "".join(part for _, part in chunks)
    appears = [seconds for seconds, part in chunks for _ in part]
    start = 0
    while start < len(text):
        end = text.find("\n", start) if "\n" in text[start:] else len(text)
        if end - start > width:
            space = text.rfind(" ", start, start + width + 1)
            end = space if space > start else start + width
        yield [
            (seconds, "".join(text[n] for n in range(start, end) if appears[n] == seconds))
            for seconds in dict.fromkeys(appears[start:end])
        ]
        start = end + (text[end : end + 1] in (" ", "\n"))


def draw_recording(texts: dict[str, Any], theme: Theme, width: int = 44, rows: int = 18) -> str:
    """Draw the texts as they appear, side by side, in a loop that the picture's CSS plays.

    A text of more than `rows` lines moves up as it grows.
    """
    ends = {method: text["chunks"][-1][0] for method, text in texts.items()}
    duration = max(ends.values()) + PAUSE
    columns = {
        method: list(lines_of([(frame_of(s), part) for s, part in text["chunks"]], width))
        for method, text in texts.items()
    }
    height = min(max(map(len, columns.values())), rows) * LINE + 40
    body, moments, style = "", set(map(frame_of, ends.values())), ""
    for n, (method, lines) in enumerate(columns.items()):
        x, wide, end = 9 + n * (width * CHARACTER + 32), width * CHARACTER, ends[method]
        title, colour = TITLES[method], theme.plain if method == "ar" else theme.accent
        speed = f"{end:.1f} s, {texts[method]['tokens'] / end:.0f} tokens/s"
        body += (
            f'<rect x="{x - 8:.0f}" y="1" width="{wide + 16:.0f}" height="{height}" rx="8" '
            f'fill="{theme.surface}" stroke="{theme.line}"/>'
            f'<text x="{x:.0f}" y="22" font-weight="bold" fill="{colour}">{title}</text>'
            f'<text x="{x + wide:.0f}" y="22" text-anchor="end" class="{class_of(frame_of(end))}" '
            f'fill="{theme.faint}">{speed}</text>'
            f'<svg x="{x:.0f}" y="32" width="{wide + 8:.0f}" height="{height - 32}">'
            f'<g class="column{n}">'
        )
        for row, line in enumerate(lines):
            parts = "".join(
                f'<tspan class="{class_of(seconds)}">{escape(part)}</tspan>'
                for seconds, part in line
            )
            moments |= {seconds for seconds, _ in line}
            body += f'<text y="{row * LINE + 14}" xml:space="preserve">{parts}</text>'
        body += "</g></svg>"
        style += motion(f"column{n}", lines, rows, duration)
    for seconds in sorted(moments):
        # A part is invisible up to its moment, and visible from then to the end of the loop.
        name, share = class_of(seconds), seconds / duration * 100
        style += (
            f"@keyframes {name}{{0%,{share:.2f}%{{opacity:0}}"
            f"{share + 0.01:.2f}%,100%{{opacity:1}}}}"
            f".{name}{{animation:{name} {duration:.2f}s linear infinite}}"
        )
    return svg(2 * width * CHARACTER + 50, height + 2, theme, body, style)


def motion(name: str, lines: Sequence[list[tuple[float, str]]], rows: int, duration: float) -> str:
    """Return the CSS that moves a text up by a line when one begins below the last of the rows."""
    left, newest = {"0.00": 0}, 0.0  # how many lines have left, by share of the loop
    for row, line in enumerate(lines):
        newest = line[0][0] if line else newest
        if row >= rows:
            left[f"{newest / duration * 100:.2f}"] = row - rows + 1
    steps = "".join(f"{share}%{{transform:translateY({-n * LINE}px)}}" for share, n in left.items())
    last = f"transform:translateY({-max(left.values()) * LINE}px)"
    return (
        f"@keyframes {name}{{{steps}100%{{{last}}}}}"
        f".{name}{{{last};animation:{name} {duration:.2f}s step-end infinite}}"
    )


def frame_of(seconds: float) -> float:
    """Return the moment at which a recording shows what appeared after so many seconds."""
    return ceil(seconds * FRAMES) / FRAMES


def class_of(seconds: float) -> str:
    """Return the CSS class of what appears at a moment of a recording."""
    return f"t{seconds * 1000:.0f}"


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__, json=False)
    options.add_argument("run", type=Path, metavar="RUN.json", help="the record of a run")
    options.add_argument("--record", action="store_true", help="record the run first")
    options.add_number("--max-tokens", 300, "new tokens of an answer")
    options.add_argument("--output", type=Path, default=PICTURES, metavar="FOLDER")
    add_model_options(options)
    return options


@command(parser)
def main(args: Namespace) -> int:
    """Record, and draw."""
    args.output.mkdir(parents=True, exist_ok=True)
    if args.record:
        model = load_model(args)
        run = record(model, PROMPTS, args.max_tokens)
        write_json(args.run, args.benchmark, describe(model.backend) | run)
    run, results = json.loads(args.run.read_text()), json.loads(RESULTS.read_text())
    step = best_step(run["steps"])
    for theme in THEMES:
        drawings = {
            "tree": draw_tree(step, theme),
            "recording": draw_recording(run["texts"], theme),
            "speed": draw_speeds(results, theme),
        }
        for name, drawing in drawings.items():
            (args.output / f"{name}-{theme.name}.svg").write_text(drawing, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
