"""Try every model type of a framework with a tiny random model, and print which can branch.

    python -m tests.helpers.families {cuda,mlx} [model_type ...]

A type is `verified` if the logits of a random tree, after a prefix longer than any sliding window,
equal the logits of its paths as plain text, here and in the framework itself, alone and beside
another text. If the type has recurrent layers, trees after commits must pass too. It is `refused`
if loading or the probe raises an error that says why, and `not tried` if there is no configuration
for the type, or one whose model lacks a kind of layer that the type has.

The modules `cuda` (types of transformers) and `mlx` (types of mlx-lm) have the configurations. They
have the same functions; `attempt` calls those of one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np

from treeflash.decoding.probe import state_difference, tree_difference
from treeflash.errors import TreeflashError, UnsupportedModelError
from treeflash.testing.comparisons import text_difference

LAYERS, WINDOW, PREFIX = 4, 8, 24
VOCAB_SIZE = 96
TOLERANCE = 1e-4
TOKENS: list[int] = np.random.default_rng(1).integers(0, VOCAB_SIZE, PREFIX).tolist()
"""A text longer than the window."""


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
