"""Solves the triangular systems of the delta rule over trees.

A solver takes M (texts, heads, n, n), b (texts, heads, n, value_dim) and the depth of the deepest
node, and returns u of (1 + M) u = b. Of M the part below the diagonal counts, which is 0 off the
paths.
"""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np

from treeflash.errors import UnsupportedModelError
from treeflash_mlx.recurrence import Solver

LIMIT = 1e-3
"""Of the largest error, as a share of the largest entry; float32 reaches 1e-6."""
NODES, WIDTH = 24, 32  # of the systems that a solver is checked with
SUBSTITUTION = """
    uint column = thread_position_in_grid.x;
    uint matrix = thread_position_in_grid.y;
    uint n = system_shape[2], width = targets_shape[3];
    for (uint i = 0; i < n; ++i) {
        float u = targets[(matrix * n + i) * width + column];
        for (uint j = 0; j < i; ++j)
            u -= system[(matrix * n + i) * n + j] * found[(matrix * n + j) * width + column];
        found[(matrix * n + i) * width + column] = u;
    }
"""


def solve_by_rounds(system: mx.array, targets: mx.array, depth: int) -> mx.array:
    """Nodes of depth d are exact after d rounds, since M is nilpotent."""
    system = mx.where(mx.tri(system.shape[2], k=-1, dtype=mx.bool_), system, 0)
    found = targets
    for _ in range(depth):
        found = targets - system @ found
    return found


def solve_by_substitution(system: mx.array, targets: mx.array, depth: int) -> mx.array:
    """One Metal kernel, a thread for each column: many rounds would be as many launches."""
    kernel = mx.fast.metal_kernel(
        name="treeflash_substitution",
        input_names=["system", "targets"],
        output_names=["found"],
        source=SUBSTITUTION,
    )
    texts, heads, _, width = targets.shape
    found: mx.array = kernel(
        inputs=[system, targets],
        grid=(width, texts * heads, 1),
        threadgroup=(min(width, 256), 1, 1),
        output_shapes=[targets.shape],
        output_dtypes=[targets.dtype],
    )[0]
    return found


def choose_solver() -> Solver:
    """The fastest solver of this device that is right.

    Raises:
        UnsupportedModelError: there is none.
    """
    if mx.metal.is_available() and mx.default_device().type == mx.gpu:
        try:
            if (error := error_of(solve_by_substitution)) <= LIMIT:
                return solve_by_substitution
            reason = f"it is wrong by {error:.1e}"
        except (RuntimeError, ValueError) as failure:
            reason = str(failure).partition("\n")[0]
        warnings.warn(f"recurrent layers run without their Metal kernel: {reason}", stacklevel=2)
    if not (error := error_of(solve_by_rounds)) <= LIMIT:
        raise UnsupportedModelError(
            "recurrent layers compute other outputs on a draft tree than token by token on this "
            f"device (wrong by {error:.1e}); --method ar still works"
        )
    return solve_by_rounds


def error_of(solver: Solver) -> float:
    """The largest error of a solver, as a share of the largest entry.

    The system is that of a chain whose keys resemble each other, so that what a node writes depends
    on all nodes before it. In a whole model the deepest of them may count for less than rounding.
    """
    rng = np.random.default_rng(0)
    system = np.tril(1 - 0.1 * rng.random((2, 3, NODES, NODES)), -1)
    expected = rng.normal(size=(2, 3, NODES, WIDTH))
    targets = expected + system @ expected
    arrays = (mx.array(x.astype(np.float32)) for x in (system, targets))
    found = np.array(solver(*arrays, NODES - 1))
    return float(np.abs(found - expected).max() / np.abs(expected).max())
