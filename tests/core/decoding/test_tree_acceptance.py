"""The acceptance walk against a search that looks at every node."""

from __future__ import annotations

import numpy as np
import pytest

from treeflash.decoding.tree import DraftTree, accept


def tree_of(tokens: list[int], parents: list[int]) -> DraftTree:
    depths = [0] * len(tokens)
    for node in range(1, len(tokens)):
        depths[node] = depths[parents[node]] + 1
    return DraftTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.array(depths, np.int32),
        np.zeros(len(tokens)),
    )


def random_tree(rng: np.random.Generator, nodes: int, vocab_size: int) -> DraftTree:
    """Siblings differ, parents come first."""
    tokens, parents = [int(rng.integers(vocab_size))], [-1]
    while len(tokens) < nodes:
        parent, token = int(rng.integers(len(tokens))), int(rng.integers(vocab_size))
        if (parent, token) not in set(zip(parents, tokens, strict=True)):
            tokens.append(token)
            parents.append(parent)
    return tree_of(tokens, parents)


def naive_walk(tree: DraftTree, chosen: np.ndarray) -> tuple[list[int], list[int]]:
    path, tokens = [0], [int(chosen[0])]
    while True:
        for node in range(len(tree)):
            if tree.parents[node] == path[-1] and tree.tokens[node] == tokens[-1]:
                path.append(node)
                tokens.append(int(chosen[node]))
                break
        else:
            return path, tokens


@pytest.mark.parametrize("nodes", [1, 2, 3, 8, 40])
def test_walk_equals_naive_walk(nodes):
    rng = np.random.default_rng(nodes)
    lengths = set()
    for _ in range(300):
        tree = random_tree(rng, nodes, vocab_size=4)
        chosen = rng.integers(0, 4, nodes).astype(np.int32)
        accepted = accept(tree, chosen)
        path, tokens = naive_walk(tree, chosen)
        assert accepted.path.tolist() == path
        assert list(accepted.tokens) == tokens
        assert accepted.path.dtype == np.int32
        lengths.add(len(path))
    assert max(lengths) >= min(nodes, 4)


def test_path_and_tokens_by_hand():
    #      9 ─ 5 ─ 7
    #        └ 6 ─ 5 ─ 8
    tree = tree_of([9, 5, 6, 7, 5, 8], [-1, 0, 0, 1, 2, 4])
    accepted = accept(tree, np.array([6, 7, 5, 0, 1, 8], np.int32))
    assert accepted.path.tolist() == [0, 2, 4]
    assert accepted.tokens == (6, 5, 1)


def test_tokens_are_plain_integers():
    accepted = accept(tree_of([9, 5], [-1, 0]), np.array([5, 3], np.int32))
    assert [type(token) for token in accepted.tokens] == [int, int]
