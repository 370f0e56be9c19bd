"""Block efficiency and speed of the decoding methods where schemas decide the form of the texts.

    python -m benchmarks.decoding.structured --backend cuda --device cpu [--json FILE]

The rows of each of three schemas with three keys are decoded one after another, as
`treeflash generate --prompts` decodes a file. Every method must write the texts of plain decoding.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common import Parser, Row, describe, mean_row, show, supported_methods, write_json
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import METHODS, Method
from treeflash.decoding.interfaces import warm_up
from treeflash.evaluation.records import MEAN
from treeflash.language_model import LanguageModel
from treeflash.text.generation import Generation, mean

PEOPLE = "Ada Lovelace", "Grace Hopper", "Alan Turing", "Marie Curie", "Emmy Noether"
CITIES = "London", "New York", "Manchester", "Paris", "Göttingen", "Copenhagen"
PRODUCTS = "kettle", "bicycle pump", "desk lamp", "rain jacket", "garden hose"
OPINIONS = {
    "negative": "It broke after a week.",
    "neutral": "It does what it says.",
    "positive": "I use it every day and love it.",
}
EVENTS = "Rust meetup", "piano recital", "book fair", "chess evening", "city run"
DATE = {"type": "string", "format": "date"}
PROPERTIES: dict[str, dict[str, Any]] = {
    "person": {"name": {"type": "string"}, "city": {"type": "string"}, "age": {"type": "integer"}},
    "review": {
        "product": {"type": "string"},
        "opinion": {"enum": [*OPINIONS]},
        "would_buy_again": {"type": "boolean"},
    },
    "event": {
        "title": {"type": "string"},
        "start_date": DATE,
        "is_online": {"type": "boolean"},
    },
}


def sentences() -> Iterator[tuple[str, str]]:
    """Yield endless rows: the name of a schema, and a text that has what it asks for."""
    number = 0
    while True:
        person, product, event = (x[number % 5] for x in (PEOPLE, PRODUCTS, EVENTS))
        city = CITIES[number % 6]
        yield "person", f"{person} is {24 + number % 60} years old and lives in {city}."
        opinion = [*OPINIONS.values()][number % 3]
        yield "review", f"Review {number + 1} of the {product}: {opinion}"
        place = "online" if number % 2 else f"in {city}"
        date = f"2026-0{1 + number % 9}-{10 + number % 20}"
        yield "event", f"The {event} takes place {place} on {date}."
        number += 1


def prompts(rows: int) -> dict[str, list[str]]:
    """Return the prompts of each schema, `rows` in all."""
    found: dict[str, list[str]] = {name: [] for name in PROPERTIES}
    for _, (name, text) in zip(range(rows), sentences(), strict=False):
        keys = ", ".join(PROPERTIES[name])
        found[name].append(f"Answer with JSON that has the keys {keys}.\n\n{text}")
    return found


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_number("--rows", 30, "rows of all schemas together")
    options.add_number("--max-tokens", 96, "new tokens per row")
    options.add_names("--methods", METHODS, "methods beside ar")
    options.add_decode_options("budget", "temperature", "seed")
    add_model_options(options)
    return options


def set_row(name: str, method: Method, runs: Sequence[Generation], keys: Sequence[str]) -> Row:
    """Return the figures of a method on the rows of one schema."""
    lengths = [length for run in runs for length in run.accepted_lengths]
    texts = [run.text for run in runs if run.finish_reason == "stop"]
    assert all([*json.loads(text)] == [*keys] for text in texts)
    return {
        "set": name,
        "method": method,
        "block_efficiency": mean(lengths),
        "tokens_per_s": sum(lengths) / sum(run.decode_s for run in runs),
        "valid": len(texts),
        "prompts": len(runs),
    }


def measure(model: LanguageModel, args: Any, methods: Sequence[Method]) -> list[Row]:
    """Build the rows of all schemas and their mean; every method writes the texts of `ar`."""
    rows: list[Row] = []
    for name, texts in prompts(args.rows).items():
        properties = PROPERTIES[name]
        schema = {
            "type": "object",
            "properties": properties,
            "required": [*properties],
            "additionalProperties": False,
        }
        plain: list[list[int]] = []
        for method in methods:
            answers = model.generate_many(
                texts,
                parallel=1,
                json_schema=schema,
                method=method,
                budget=args.budget,
                temperature=args.temperature,
                seed=args.seed,
                max_tokens=args.max_tokens,
            )
            runs = [run for _, run in sorted(answers, key=lambda answer: answer[0])]
            tokens = [run.token_ids for run in runs]
            plain = plain or tokens
            assert tokens == plain, f"{method} wrote other texts"
            rows.append(set_row(name, method, runs, [*properties]))
    figures = ("block_efficiency", "tokens_per_s")
    return rows + [mean_row(rows, {"method": method}, figures) for method in methods]


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    model = load_model(args)
    supported = supported_methods(model.backend)
    plain: Method = "ar"
    methods = list(dict.fromkeys([plain, *(x for x in args.methods if x in supported)]))
    warm_up(model.backend, 1)
    rows = measure(model, args, methods)
    pair = describe(model.backend)
    title = f"structured output, {', '.join(pair.values())}, {args.rows} rows"
    show(title, [row for row in rows if row["set"] == MEAN])
    write_json(args.json, "structured", pair | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
