"""A test at load that a target can run draft trees; it makes every model family safe."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.tree import DraftTree
from treeflash.errors import TreeflashError, UnsupportedModelError, is_out_of_memory

# Branches that swap column and depth order: a position or a mask taken from columns shows.
PARENTS = np.array([-1, 0, 1, 2, 0, 4, 1], np.int32)
ATTEMPTS = 8
# Of `tree_difference`, by dtype.
TOLERANCES = {"float32": 2e-3, "float16": 0.02, "bfloat16": 0.05}


def check_trees(backend: Backend, seed: int = 0) -> None:
    """Compare a small random tree with each of its paths run alone, as plain text.

    In half precision a mixture of experts may route a near-tie either way, so several trees may
    be tried. A target that cannot branch fails them all.

    Args:
        backend: just loaded.
        seed: of the tokens.

    Raises:
        UnsupportedModelError: they differ, or the target cannot run the tree at all.
        NumericalError: the logits are not finite.
    """
    rng = np.random.default_rng(seed)
    difference = np.inf
    try:
        for _ in range(ATTEMPTS):
            difference = min(difference, tree_difference(backend, rng))
            if difference <= TOLERANCES[backend.dtype]:
                return
    except TreeflashError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"the {backend.name} backend cannot run this target on a draft tree ({error}); "
            "--method ar still works"
        ) from error
    raise UnsupportedModelError(
        f"this target gives other logits on a draft tree than on plain text (they differ by "
        f"{difference:.1%}), so drafting would change its output; --method ar still works"
    )


def tree_difference(backend: Backend, rng: np.random.Generator, prefix_length: int = 5) -> float:
    """How far the logits on a tree of random tokens are from those on plain text.

    Args:
        backend: only its target is used.
        rng: for the tokens.
        prefix_length: tokens before the tree.

    Returns:
        The worst leaf's root mean square difference, as a share of the logits' standard deviation.
    """
    greedy = SamplingConfig()
    prefix = rng.integers(0, backend.vocab_size, prefix_length).tolist()
    tree = _tree(rng.integers(0, backend.vocab_size, len(PARENTS)).astype(np.int32))
    verifier = backend.verifier(features=False)
    verifier.prefill(prefix, greedy, None)
    branched = verifier.logits(tree)
    worst = 0.0
    for leaf in sorted(set(range(len(tree))) - set(tree.parents.tolist())):
        path = np.flatnonzero(tree.ancestor_mask()[leaf])
        alone = backend.verifier(features=False)
        alone.prefill(prefix + tree.tokens[path[:-1]].tolist(), greedy, None)
        plain = alone.logits(DraftTree.root_only(int(tree.tokens[leaf])))[0]
        error = np.sqrt(np.mean((branched[leaf] - plain) ** 2)) / plain.std()
        worst = max(worst, float(error))
    return worst


def _tree(tokens: NDArray[np.int32]) -> DraftTree:
    depths = np.zeros(len(PARENTS), np.int32)
    for node, parent in enumerate(PARENTS[1:], 1):
        depths[node] = depths[parent] + 1
    return DraftTree(tokens, PARENTS, depths, np.zeros(len(PARENTS)))
