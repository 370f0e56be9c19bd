"""Hybrid targets: the inputs of a convolution on a tree and after a path, and refusals."""

import numpy as np
import pytest

from treeflash.decoding.families import refusal
from treeflash.decoding.hybrid import convolution_tail, convolution_windows
from treeflash.testing.comparisons import path_to, random_tree


@pytest.mark.parametrize("kernel", [1, 2, 4, 7])
def test_windows_and_tails_are_those_of_each_path_as_text(kernel):
    rng = np.random.default_rng(kernel)
    tree = random_tree(rng, 3, 20, 50)
    sequence = rng.integers(0, 50, 30)
    rows = np.concatenate([sequence[len(sequence) - kernel + 1 :], tree.tokens])
    windows = convolution_windows(tree.parents, kernel)
    assert windows.dtype == np.int32
    for node in range(len(tree)):
        path = path_to(tree, node)
        whole = np.concatenate([sequence, tree.tokens[path]])
        np.testing.assert_array_equal(rows[windows[node]], whole[len(whole) - kernel :])
        tail = rows[convolution_tail(path, kernel)]
        np.testing.assert_array_equal(tail, whole[len(whole) - kernel + 1 :])


def test_refusals_name_the_type_and_the_reason():
    assert refusal("mamba") == (
        "mamba models cannot run a draft tree: their recurrent layers decay each channel of the "
        "state separately"
    )
    assert "they are square" in refusal("new", "they are square")
    assert "of an unknown kind" in refusal("new")
