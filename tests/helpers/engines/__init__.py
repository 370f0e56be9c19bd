"""The engines under test: a module for each, with the same functions.

families: the module of `families` for the engine's framework.
load(target, drafter=None, **settings): a pair; on a CPU and in float32 unless settings differ.
plain_text(folder, prompt, length): the greedy text of the framework's own model.
outputs_of_layers(folder, layer_ids, texts): what a drafter reads, by text, then the target's
embeddings, output head, and number of layers.
set_chunks(backend, size): prompts run in chunks of this size, or fewer tokens.
quantised_parts(backend): the names of layers of the drafter and its head in few bits.
"""

from __future__ import annotations

from typing import Any

import pytest

PACKAGES = {"cuda": "torch", "mlx": "mlx_lm"}
"""The names of the engines, and the package that each needs."""


def each(names: tuple[str, ...], **cases: Any) -> pytest.MarkDecorator:
    """Give a test its cases by engine: a name, or several values."""
    rows = [
        (engine, *([case] if isinstance(case, str) else case))
        for engine, of_engine in cases.items()
        for case in of_engine
    ]
    return pytest.mark.parametrize(("engine", *names), rows, indirect=["engine"])
