"""The engines under test: a module for each, with the same functions.

- `families` is the module of `families` for the engine's framework, `images` the engine's own of
  images.
- `load(target, drafter=None, **settings)` loads a pair, on a CPU and in float32 by default.
- `plain_text(folder, prompt, length)` is the greedy text of the framework's own model.
- `outputs_of_layers(folder, layer_ids, texts)` is what a drafter reads, by text, then the target's
  embeddings, output head, and number of layers.
- `set_chunks(backend, size)` lets prompts run in chunks of at most `size` tokens.
- `quantised_parts(backend)` are the names of layers of the drafter and its head in few bits.
- `save_with_images(family, model, folder)` saves a model of `image_models` as the engine reads it;
  `image_samples(backend)` is what the check of images at load compares.
- `tower_nbytes(backend)` is the size of a target's vision tower; `repeated_norms_nbytes(backend)`
  of the norms that layers of our own have for every head, beyond one of queries and one of keys.
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
