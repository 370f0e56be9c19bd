"""Try every model type of a framework with a tiny random model, and print which can branch.

    python -m tests.helpers.families {cuda,mlx} [model_type ...]

A type is `verified` if the logits of a random tree, after a prefix longer than any sliding window,
equal the logits of its paths as plain text, here and in the framework itself, alone and beside
another text. If the type has recurrent layers, trees after commits must pass too. It is `refused`
if loading or the probe raises an error that says why, and `not tried` if there is no configuration
for the type, or one whose model lacks a kind of layer that the type has.

The modules `cuda` (types of transformers) and `mlx` (types of mlx-lm) have equal functions;
`attempt` calls the ones of a module. Their configurations are in `cuda_types.json` and
`mlx_types.json`: small values of `fields`, from which a type takes what it knows, and `settings` of
single types, with all the kinds of layers that a type has. A key may be several names.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from treeflash.decoding.probe import state_difference, tree_difference
from treeflash.errors import TreeflashError, UnsupportedModelError
from treeflash.testing.comparisons import text_difference
from treeflash.testing.models import write_drafter
from treeflash.testing.pairs import DRAFTER_SEED

LAYERS, WINDOW, PREFIX = 4, 8, 24
VOCAB_SIZE = 96
SMALL_VOCABULARY = dict.fromkeys(("vocab_size", "padded_vocab_size"), 24)
TOLERANCE = 1e-4
TOKENS: list[int] = np.random.default_rng(1).integers(0, VOCAB_SIZE, PREFIX).tolist()
"""A text longer than the window."""


def by_name(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Collect the settings of each type from rows that may name several types."""
    found: dict[str, dict[str, Any]] = {}
    for names, settings in table.items():
        for name in names.split():
            found[name] = found.get(name, {}) | settings
    return found


def attempt(framework: ModuleType, name: str) -> tuple[str, str]:
    """The outcome (`verified`, `refused` or `not tried`), and the difference or the reason."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            lacking = framework.missing_layers(name, framework.configuration(name))
            if lacking:
                return "not tried", f"the tiny model lacks {', '.join(sorted(lacking))}"
            plain_logits = framework.write_for_comparison(Path(folder), name)
        except (Exception, SystemExit) as error:
            return "not tried", f"{type(error).__name__}: {str(error)[:90]}"
        try:
            backend, rng = framework.load(Path(folder)), np.random.default_rng(0)
            errors = (
                tree_difference(backend, rng, PREFIX),
                state_difference(backend, rng, PREFIX),
                text_difference(backend, TOKENS, plain_logits()),
            )
            error = float(np.max(errors))  # `max` may pass over NaN
        except UnsupportedModelError as error:
            return "refused", str(error)
        except TreeflashError as error:
            return "not tried", str(error)
        except Exception as error:  # the load probe turns these into refusals
            return "refused", f"probe: {type(error).__name__}: {str(error)[:90]}"
    if not error <= TOLERANCE:
        return "refused", f"probe: differs by {error:.1e}"
    return "verified", f"{error:.0e}"


def write_pair(framework: ModuleType, folder: Path, name: str, **fields: Any) -> tuple[Path, Path]:
    """Save a random target of a type, and a drafter for it; returns their folders.

    The vocabulary is so small that the drafter, which is random too, is right at times.
    """
    target, described = folder / "target", folder / "described"
    framework.write(target, name, **SMALL_VOCABULARY | fields)
    # Types call the sizes of a target by different names.
    sizes = {"hidden_size": 64, "num_hidden_layers": LAYERS, "max_position_embeddings": 512}
    sizes |= SMALL_VOCABULARY | {name: fields[name] for name in sizes if name in fields}
    described.mkdir()
    (described / "config.json").write_text(json.dumps(sizes))
    layer_ids = 0, sizes["num_hidden_layers"] // 2
    write_drafter(folder / "drafter", described, seed=DRAFTER_SEED, target_layer_ids=layer_ids)
    return target, folder / "drafter"


def main(framework: ModuleType, names: list[str]) -> None:
    """Print a line for each model type, and the totals."""
    framework.prepare()
    outcomes: dict[str, list[str]] = {}
    for name in names or framework.model_types():
        outcome, reason = attempt(framework, name)
        outcomes.setdefault(outcome, []).append(name)
        print(f"{name:24} {outcome:10} {reason}", flush=True)
    for outcome, types in sorted(outcomes.items()):
        print(f"\n{outcome}: {len(types)}\n  {', '.join(types)}")
