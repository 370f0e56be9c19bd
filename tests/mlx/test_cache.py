"""Moves of keys and values, by which sequences come to share a storage."""

import numpy as np
import pytest

from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from treeflash_mlx.cache import (
    BatchStorage,
    KVCache,
    share_storage,
    size_class,
)


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


def test_only_sequences_of_similar_capacity_share_a_storage():
    assert size_class(256) == size_class(1024) < size_class(1280) == size_class(2048)
    assert size_class(2048) < size_class(2304) == size_class(4096)
