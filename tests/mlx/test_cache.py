import numpy as np
import pytest

from treeflash.decoding.tree import DraftTree
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx  # noqa: E402
from treeflash_mlx.cache import (  # noqa: E402
    KeyValues,
    Quantisation,
    QuantisedTreeCache,
    TreeCache,
    share_storage,
)
from treeflash_mlx.tree_hooks import TreePass  # noqa: E402

START = 3
TREE = DraftTree(
    np.arange(5, dtype=np.int32),
    np.array([-1, 0, 0, 1, 2], np.int32),
    np.array([0, 1, 1, 2, 2], np.int32),
    np.zeros(5),
)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("path", [[0], [0, 1], [0, 1, 3], [0, 2, 4]])
def test_a_commit_keeps_the_rows_of_the_path_alone(rng, path, quantised):
    text = KeyValues(1, START + 5, Quantisation(8, 32) if quantised else None)
    keys, values = (mx.array(rng.normal(size=(1, 2, START + 5, 32)), mx.float32) for _ in "kv")
    write([text], keys[:, :, :START], values[:, :, :START], None)
    text.length = START
    tree = TreePass.of([TREE], [START], 255)
    write([text], keys[:, :, START:], values[:, :, START:], tree)
    text.storage.keep({0: (START, np.array(path, np.int32))})
    text.length += len(path)
    rows = [0, 1, 2, *(START + node for node in path)]
    expected = np.stack([keys, values])[:, 0][:, :, rows]
    np.testing.assert_allclose(text.read()[0], expected, atol=0.03 if quantised else 0)


def write(texts, keys, values, tree):
    """What a layer does in a forward pass."""
    storage, q = share_storage(texts), texts[0].quantisation
    args = storage, 0, None, texts[0].length, tree, {}
    cache = TreeCache(*args) if q is None else QuantisedTreeCache(q, *args)
    return cache.update_and_fetch(keys, values)


def test_texts_that_run_together_are_copied_once(rng):
    """And each keeps its rows, whatever the lengths and paths; nothing is written over."""
    lengths, paths = (3, 0, 7), ([0, 2, 4], [0], [0, 1, 3])
    texts = [KeyValues(1, 40 + 300 * i) for i in range(3)]
    expected = []
    for text, length in zip(texts, lengths, strict=True):
        rows = mx.array(rng.normal(size=(2, 1, 2, length, 32)), mx.float32)
        if length:
            write([text], *rows, None)
        text.length = length
        expected.append(np.array(rows)[:, 0])
    storage = share_storage(texts)
    assert storage.columns > 640
    for _ in range(3):
        new = mx.array(rng.normal(size=(2, 3, 2, 5, 32)), mx.float32)
        tree = TreePass.of([TREE] * 3, [text.length for text in texts], storage.columns - 1)
        write(texts, *new, tree)
        storage.keep(
            {
                i: (text.length, np.array(path, np.int32))
                for i, (text, path) in enumerate(zip(texts, paths, strict=True))
            }
        )
        for i, (text, path) in enumerate(zip(texts, paths, strict=True)):
            text.length += len(path)
            rows = np.array(new)[:, i][:, :, path]
            expected[i] = np.concatenate([expected[i], rows], 2)
        assert share_storage(texts[::-1]) is storage
    for text, rows in zip(texts, expected, strict=True):
        np.testing.assert_array_equal(text.read()[0], rows)
    assert sum(text.nbytes for text in texts) == storage.nbytes
    texts[1].close()
    assert sum(text.nbytes for text in texts) == storage.nbytes
    joined = share_storage([texts[2], texts[0]])
    assert joined is not storage
    for i in (0, 2):
        np.testing.assert_array_equal(texts[i].read()[0], expected[i])
    assert joined.nbytes < storage.nbytes


def test_a_copy_is_independent(rng):
    text = KeyValues(1, 40)
    rows = mx.array(rng.normal(size=(2, 1, 2, 9, 32)), mx.float32)
    write([text], *rows, None)
    text.length = 9
    new = text.copy(5, 300)
    assert (new.length, new.capacity) == (5, 300)
    text.length = 0
    write([text], *(rows + 1), None)
    np.testing.assert_array_equal(new.read()[0], np.array(rows)[:, 0, :, :5])


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("branches", [False, True])
def test_layers_with_a_window_fetch_what_it_reaches(rng, nodes, branches):
    """By the model's window, which may be wider than its cache's."""
    text = KeyValues(1, 200)
    keys = mx.array(rng.normal(size=(2, 1, 2, 100 + nodes, 8)), mx.float32)
    write([text], *keys[:, :, :, :100], None)
    text.length = 100
    tree = None
    if branches:
        parents = np.maximum(np.arange(nodes, dtype=np.int32) - 2, 0) - (np.arange(nodes) == 0)
        shape = DraftTree.from_parents(np.arange(nodes, dtype=np.int32), parents.astype(np.int32))
        tree = TreePass.of([shape], [100], 255)
    first = {}
    layers = [TreeCache(text.storage, 0, window, 100, tree, first) for window in (16, None)]
    mask = layers[0].make_mask(nodes, return_array=True, window_size=17)
    fetched = [cache.update_and_fetch(*keys[:, :, :, 100:])[0] for cache in layers]
    assert [x.shape[2] for x in fetched] == [16 + nodes, 100 + nodes]
    np.testing.assert_array_equal(fetched[0], fetched[1][:, :, 84:])
    if mask is not None:
        assert mask.shape[-2:] == (nodes, 16 + nodes)
        assert mask[0].sum() == 17
