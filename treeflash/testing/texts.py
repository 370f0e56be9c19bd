"""Random prompts and trees."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.tree import DraftTree


def random_tokens(rng: np.random.Generator, vocab_size: int, length: int) -> list[int]:
    """So many tokens."""
    return [int(token) for token in rng.integers(0, vocab_size, length)]


def random_tree(rng: np.random.Generator, root: int, nodes: int, vocab_size: int) -> DraftTree:
    """A tree whose siblings differ, deep and branching; its log probabilities mean nothing."""
    tokens, parents, depths = [root], [-1], [0]
    while len(tokens) < nodes:
        # Half of the nodes extend one of the newest, or the tree would stay shallow.
        newest = max(0, len(tokens) - 3) if rng.random() < 0.5 else 0
        parent = int(rng.integers(newest, len(tokens)))
        token = int(rng.integers(vocab_size))
        if (parent, token) not in zip(parents, tokens, strict=True):
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
    return DraftTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.array(depths, np.int32),
        np.zeros(nodes),
    )


def path_to(tree: DraftTree, node: int) -> NDArray[np.int32]:
    """(depth + 1,) int32 nodes from the root down to a node."""
    path = [node]
    while path[-1] > 0:
        path.append(int(tree.parents[path[-1]]))
    return np.array(path[::-1], np.int32)


def chain_to(tree: DraftTree, node: int) -> DraftTree:
    """The path to a node as a tree of its own."""
    path = path_to(tree, node)
    order = np.arange(len(path), dtype=np.int32)
    return DraftTree(tree.tokens[path], order - 1, order, tree.log_probs[path])
