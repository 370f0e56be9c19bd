"""Acceptance: the path of a tree on which the drafter and the target agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.tree import DraftTree


@dataclass(frozen=True, eq=False)
class Acceptance:
    """The outcome of verifying one tree.

    Attributes:
        path: (a,) int32 node indices from the root down; path[0] == 0, each the parent of the
            next.
        tokens: the a tokens committed: those of path[1:], then the bonus token, which the target
            chose at the last node of the path and which is the next root.
    """

    path: NDArray[np.int32]
    tokens: tuple[int, ...]


def accept(tree: DraftTree, chosen: NDArray[np.int32]) -> Acceptance:
    """Follow the target's choices through the tree (TreeFlash, section 3; SpecInfer).

    The target chose each token after its true prefix, and the tree was fixed before: the tokens
    returned have exactly the distribution of plain decoding, at every temperature.

    Args:
        tree: the verified tree.
        chosen: (n,) int32 the target's token at each node.
    """
    children = {
        (parent, token): node
        for node, (parent, token) in enumerate(
            zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)
        )
    }
    choices = chosen.tolist()
    path = [0]
    while (child := children.get((path[-1], choices[path[-1]]))) is not None:
        path.append(child)
    return Acceptance(np.array(path, np.int32), tuple(choices[node] for node in path))
