"""Keys and values of sequences that share a storage: commits, moves, copies, windows and masks."""

import numpy as np
import pytest

from treeflash.decoding.tree import DraftTree
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from treeflash_mlx.attention import TreePass
from treeflash_mlx.cache import (
    BatchStorage,
    KVCache,
    Quantisation,
    QuantisedTreeCache,
    TreeCache,
    share_storage,
    size_class,
)

START = 3
TREE = DraftTree.from_parents(np.arange(5, dtype=np.int32), np.array([-1, 0, 0, 1, 2], np.int32))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("path", [[0], [0, 1], [0, 1, 3], [0, 2, 4]])
def test_a_commit_keeps_the_rows_of_the_path_alone(rng, path, quantised):
    sequence = KVCache(1, START + 5, Quantisation(8, 32) if quantised else None)
    keys, values = (mx.array(rng.normal(size=(1, 2, START + 5, 32)), mx.float32) for _ in "kv")
    write([sequence], keys[:, :, :START], values[:, :, :START], None)
    sequence.length = START
    tree = TreePass.build([TREE], [START], 255)
    write([sequence], keys[:, :, START:], values[:, :, START:], tree)
    sequence.storage.commit({0: (START, np.array(path, np.int32))})
    sequence.length += len(path)
    rows = [0, 1, 2, *(START + node for node in path)]
    expected = np.stack([keys, values])[:, 0][:, :, rows]
    np.testing.assert_allclose(sequence.read()[0], expected, atol=0.03 if quantised else 0)


def write(sequences, keys, values, tree):
    """What a layer does in a forward pass."""
    storage, q = share_storage(sequences), sequences[0].quantisation
    args = storage, 0, None, sequences[0].length, tree, {}
    cache = TreeCache(*args) if q is None else QuantisedTreeCache(*args, q.bits, q.group_size)
    return cache.update_and_fetch(keys, values)


def test_sequences_that_run_together_are_copied_once(rng):
    """Each keeps its rows, whatever the lengths and paths; nothing is overwritten."""
    lengths, paths = (3, 0, 7), ([0, 2, 4], [0], [0, 1, 3])
    sequences = [KVCache(1, 40 + 300 * i) for i in range(3)]
    expected = []
    for sequence, length in zip(sequences, lengths, strict=True):
        rows = mx.array(rng.normal(size=(2, 1, 2, length, 32)), mx.float32)
        if length:
            write([sequence], *rows, None)
        sequence.length = length
        expected.append(np.array(rows)[:, 0])
    storage = share_storage(sequences)
    assert storage.columns > 640
    for _ in range(3):
        new = mx.array(rng.normal(size=(2, 3, 2, 5, 32)), mx.float32)
        tree = TreePass.build(
            [TREE] * 3, [sequence.length for sequence in sequences], storage.columns - 1
        )
        write(sequences, *new, tree)
        storage.commit(
            {
                i: (sequence.length, np.array(path, np.int32))
                for i, (sequence, path) in enumerate(zip(sequences, paths, strict=True))
            }
        )
        for i, (sequence, path) in enumerate(zip(sequences, paths, strict=True)):
            sequence.length += len(path)
            rows = np.array(new)[:, i][:, :, path]
            expected[i] = np.concatenate([expected[i], rows], 2)
        assert share_storage(sequences[::-1]) is storage
    for sequence, rows in zip(sequences, expected, strict=True):
        np.testing.assert_array_equal(sequence.read()[0], rows)
    assert sum(sequence.nbytes for sequence in sequences) == storage.nbytes
    sequences[1].close()
    before = storage.nbytes
    assert sum(sequence.nbytes for sequence in sequences) == before
    joined = share_storage([sequences[2], sequences[0]])
    assert joined is not storage
    for i in (0, 2):
        np.testing.assert_array_equal(sequences[i].read()[0], expected[i])
    assert (joined.nbytes, storage.nbytes) == (before * 2 // 3, 0)


def test_a_move_frees_each_layer_before_it_copies_the_next(rng):
    """The peak is one copy of everything and a layer, not two copies."""
    layers, columns = 8, 5000
    sequences = [KVCache(layers, columns) for _ in range(2)]
    for sequence in sequences:
        for layer in range(layers):
            rows = mx.array(rng.normal(size=(2, 1, 2, 4, 32)), mx.float32)
            share_storage([sequence]).write(layer, list(rows), 0)
        sequence.length = 4
        mx.eval(sequence.storage.layers)
    held = sum(sequence.nbytes for sequence in sequences)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    share_storage(sequences)
    assert mx.get_peak_memory() - before < 1.5 * held / layers
    assert sum(sequence.nbytes for sequence in sequences) == held


@pytest.mark.parametrize("failing", [0, 2])
def test_a_move_that_fails_changes_no_sequence(rng, monkeypatch, failing):
    sequences, expected = [KVCache(3, 40 + 300 * i) for i in range(2)], []
    for sequence in sequences:
        rows = mx.array(rng.normal(size=(3, 2, 1, 2, 9, 32)), mx.float32)
        for layer in range(3):
            share_storage([sequence]).write(layer, list(rows[layer]), 0)
        sequence.length = 9
        expected.append(np.array(rows)[:, :, 0])
    fill = BatchStorage.fill

    def fail(storage, layer, rows):
        if layer == failing:
            raise RuntimeError("[malloc] Unable to allocate 5 bytes.")
        fill(storage, layer, rows)

    monkeypatch.setattr(BatchStorage, "fill", fail)
    fresh = KVCache(3, 40)
    with pytest.raises(RuntimeError):
        share_storage([*sequences, fresh])
    monkeypatch.undo()
    assert fresh.storage is None
    for sequence, rows in zip(sequences, expected, strict=True):
        assert share_storage([sequence]).columns == sequence.columns
        np.testing.assert_array_equal(sequence.read(), rows)
    share_storage(sequences)
    for sequence, rows in zip(sequences, expected, strict=True):
        np.testing.assert_array_equal(sequence.read(), rows)


def test_a_copy_is_independent(rng):
    sequence = KVCache(1, 40)
    rows = mx.array(rng.normal(size=(2, 1, 2, 9, 32)), mx.float32)
    write([sequence], *rows, None)
    sequence.length = 9
    new = sequence.copy(5, 300)
    assert (new.length, new.capacity) == (5, 300)
    sequence.length = 0
    write([sequence], *(rows + 1), None)
    np.testing.assert_array_equal(new.read()[0], np.array(rows)[:, 0, :, :5])


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("branches", [False, True])
def test_layers_with_a_window_fetch_what_it_reaches(rng, nodes, branches):
    """By the model's window, which may be wider than its cache's."""
    sequence = KVCache(1, 200)
    keys = mx.array(rng.normal(size=(2, 1, 2, 100 + nodes, 8)), mx.float32)
    write([sequence], *keys[:, :, :, :100], None)
    sequence.length = 100
    tree = None
    if branches:
        parents = np.maximum(np.arange(nodes, dtype=np.int32) - 2, 0) - (np.arange(nodes) == 0)
        shape = DraftTree.from_parents(np.arange(nodes, dtype=np.int32), parents.astype(np.int32))
        tree = TreePass.build([shape], [100], 255)
    first = {}
    layers = [TreeCache(sequence.storage, 0, window, 100, tree, first) for window in (16, None)]
    mask = layers[0].make_mask(nodes, return_array=True, window_size=17)
    fetched = [cache.update_and_fetch(*keys[:, :, :, 100:])[0] for cache in layers]
    assert [x.shape[2] for x in fetched] == [16 + nodes, 100 + nodes]
    np.testing.assert_array_equal(fetched[0], fetched[1][:, :, 84:])
    if mask is not None:
        assert mask.shape[-2:] == (nodes, 16 + nodes)
        assert mask[0].sum() == 17


def test_only_sequences_of_similar_capacity_share_a_storage():
    assert size_class(256) == size_class(1024) < size_class(1280) == size_class(2048)
    assert size_class(2048) < size_class(2304) == size_class(4096)


def test_a_mask_is_made_from_the_nodes_alone():
    """It equals the mask over all columns, with a window and without, alone and in a batch."""
    trees, starts = [TREE, DraftTree.chain(np.arange(3, dtype=np.int32))], [9, 4]
    for first, window in ((0, None), (0, 6), (2, 3)):
        tree_pass = TreePass.build(trees, starts, 255)
        assert sum(x.size for x in (tree_pass.positions, tree_pass.ancestors)) == 2 * (5 + 25)
        found = np.array(tree_pass.mask(window, first))
        assert found.shape == (2, 1, 5, 14 - first)
        for i, (tree, start) in enumerate(zip(trees, starts, strict=True)):
            size, keys = len(tree), np.arange(14)
            positions = tree.positions(start)
            keys[start : start + size] = positions
            expected = np.zeros((size, 14), bool)
            expected[:, :start] = True
            expected[:, start : start + size] = tree.ancestor_mask()
            if window is not None:
                expected &= positions[:, None] - keys < window
            np.testing.assert_array_equal(found[i, 0, :size], expected[:, first:])
            if tree is TREE:
                alone = TreePass.build([tree], [start], 255).mask(window, first)
                np.testing.assert_array_equal(np.array(alone), expected[:, first : start + size])
