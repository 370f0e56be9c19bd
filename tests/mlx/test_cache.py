import numpy as np
import pytest

from treeflash.decoding.tree import DraftTree
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx  # noqa: E402
from treeflash_mlx.cache import QuantisedTreeCache, TreeCache  # noqa: E402
from treeflash_mlx.tree_hooks import TreeHooks, TreePass  # noqa: E402

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
    hooks = TreeHooks()
    cache = QuantisedTreeCache(hooks, None, 8, 32) if quantised else TreeCache(hooks, None)
    keys, values = (mx.array(rng.normal(size=(1, 2, START + 5, 32)), mx.float32) for _ in "kv")
    cache.update_and_fetch(keys[:, :, :START], values[:, :, :START])
    with hooks.forward_pass(TreePass.of(TREE, START), capture=False):
        cache.update_and_fetch(keys[:, :, START:], values[:, :, START:])
    cache.commit(START, np.array(path, np.int32))
    rows = mx.array([0, 1, 2, *(START + node for node in path)])
    for held, whole in zip(cache.read(), (keys, values), strict=True):
        assert mx.allclose(held, whole[:, :, rows], atol=0.03 if quantised else 0)
