"""Random transition tables: smooth and peaked ones, with ties, and with holes."""

from __future__ import annotations

import numpy as np

from treeflash.decoding.transitions import TransitionTable

ROOT = 7
BUDGETS = (1, 2, 3, 16, 64, 256, 1024)
# (depths, rows, children)
SHAPES = [(1, 1, 1), (1, 4, 6), (2, 1, 5), (4, 3, 1), (5, 2, 3), (7, 1, 4), (7, 5, 4), (15, 16, 16)]
KINDS = ["smooth", "peaked", "ties", "flat", "certain", "holes", "dead-ends"]


def random_table(kind: str, shape: tuple[int, int, int], seed: int) -> TransitionTable:
    """A table of one kind; log probabilities do not increase along the children."""
    rng = np.random.default_rng([seed, *shape, KINDS.index(kind)])
    depths, rows, children = shape
    tokens = rng.permuted(np.tile(np.arange(3 * children), (depths, rows, 1)), axis=-1)
    next_row = rng.integers(0, rows, shape)
    next_row[-1] = -1
    logits = rng.normal(size=(depths, rows, 3 * children)) * (6 if kind == "peaked" else 1.5)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_probs = -np.sort(-log_probs)[..., :children]
    if kind == "ties":  # few values, whose sums meet again at other depths
        log_probs = -np.sort(rng.integers(1, 5, shape) / 2)
    elif kind == "flat":
        log_probs = np.full(shape, -1.0)
    elif kind == "certain":  # a first child as probable as its parent
        log_probs = -np.sort(rng.integers(1, 5, shape) / 2)
        log_probs[..., 0] = 0
    elif kind == "holes":
        log_probs[
            np.arange(children) >= rng.integers(0, children + 1, shape[:2])[..., None]
        ] = -np.inf
    elif kind == "dead-ends":
        next_row[rng.random(shape) < 0.5] = -1
    return TransitionTable(
        tokens[..., :children].astype(np.int32),
        log_probs.astype(np.float32),
        next_row.astype(np.int32),
    )
