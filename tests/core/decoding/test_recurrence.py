"""What a recurrent layer reads at each node of a tree, and what remains after a path."""

import numpy as np
import pytest

from treeflash.decoding.recurrence import convolution_tail, convolution_windows, refusal
from treeflash.decoding.snapshots import MOST, Snapshots
from treeflash.testing.texts import path_to, random_tree


@pytest.mark.parametrize("kernel", [1, 2, 4, 7])
def test_windows_and_tails_are_those_of_each_path_as_text(kernel):
    rng = np.random.default_rng(kernel)
    tree = random_tree(rng, 3, 20, 50)
    text = rng.integers(0, 50, 30)
    rows = np.concatenate([text[len(text) - kernel + 1 :], tree.tokens])
    windows = convolution_windows(tree.parents, kernel)
    assert windows.dtype == np.int32
    for node in range(len(tree)):
        path = path_to(tree, node)
        whole = np.concatenate([text, tree.tokens[path]])
        np.testing.assert_array_equal(rows[windows[node]], whole[len(whole) - kernel :])
        tail = rows[convolution_tail(path, kernel)]
        np.testing.assert_array_equal(tail, whole[len(whole) - kernel + 1 :])


def test_refusals_name_the_type_and_the_reason():
    assert refusal("mamba") == (
        "mamba models cannot run a draft tree: their recurrent layers decay every channel of the "
        "state by itself"
    )
    assert "they are square" in refusal("new", "they are square")
    assert "of an unknown kind" in refusal("new")


def test_the_latest_snapshots_are_kept():
    snapshots = Snapshots()
    for length in range(1, MOST + 3):
        snapshots.take(10 * length, f"at {length}")
    assert len(list(snapshots)) == MOST
    assert snapshots.longest(20) == 0
    assert snapshots.longest(39) == 30
    assert snapshots.at(30) == "at 3"
    assert list(snapshots.until(45)) == ["at 3", "at 4"]
    snapshots.truncate(35)
    assert list(snapshots) == ["at 3"]
