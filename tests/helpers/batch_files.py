"""A file of prompts, answers to it, and what a run over it wrote."""

from __future__ import annotations

import json

ROWS = [
    {"id": "a", "category": "x", "turns": ["one", "two"]},
    {"id": 7, "prompt": "three"},
    {
        "id": "c",
        "messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "4"}],
    },
]
ANSWERS = ["Eins, zwei.", "Drei é vier.", "Fünf.", "Sechs, sieben, acht."]
KEYS = [("a", 0), ("a", 1), (7, 0), ("c", 0)]


def records(path) -> list[dict]:
    """The lines of an output file."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def keys(path) -> list[tuple]:
    """The turns in an output file."""
    return [(record["id"], record["turn"]) for record in records(path)]


def asked(model, number: int) -> str:
    """One of the model's prompts, as text."""
    return model.tokenizer.decode(model.backend.prompts[number])
