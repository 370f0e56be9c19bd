"""Faults of recurrent layers on trees, each of which the check at load refuses."""

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from treeflash_mlx import attention, hybrid, metal_kernels
from treeflash_mlx.backend import load
from treeflash_mlx.hybrid import NodePaths, Writes


def windows_by_column(paths, kernel):
    rows = np.arange(paths.nodes)[:, None] + np.arange(kernel)
    return mx.array(np.broadcast_to(rows, (paths.batch_size, *rows.shape)).astype(np.int32))


class CausalPaths(NodePaths):
    def __init__(self, trees, solve):
        super().__init__(trees, solve)
        self.ancestors = mx.broadcast_to(mx.tri(self.nodes, dtype=mx.bool_), self.ancestors.shape)


def one_round_less(system, targets, depth):
    return ROUNDS(system, targets, depth - 1)


def without_decay(written, state, nodes, kept):
    still = Writes(
        written.values, written.keys, mx.zeros_like(written.log_decays), written.keys_first
    )
    return AFTER(still, state, nodes, kept)


def whole_block(written, state, nodes, kept):
    nodes = mx.arange(written.keys.shape[2])[None]
    return AFTER(written, state, nodes, mx.ones(nodes.shape, mx.bool_))


def without_own_decay(queries, keys, values, log_decays, *args):
    outputs, written = RUN_TREE(queries, keys, values, mx.zeros_like(log_decays), *args)
    return outputs, Writes(written.values, keys, log_decays)


def last_columns(path, kernel):
    return np.arange(kernel - 1, dtype=np.int32) + len(path)


def chains_as_text(trees, *args, solve, **options):
    return TREE_PASS(trees, *args, solve=None if trees[0].is_chain else solve, **options)


ROUNDS = hybrid.solve_by_rounds
AFTER, RUN_TREE, TREE_PASS = Writes.commit, hybrid.run_tree, attention.TreePass.build
BROKEN = {
    "convolution by column": (NodePaths, "windows", windows_by_column),
    "causal mask": (attention, "NodePaths", CausalPaths),
    "pass without decay": (hybrid, "run_tree", without_own_decay),
    "commit without decay": (Writes, "commit", without_decay),
    "commit of the whole block": (Writes, "commit", whole_block),
    "tail of the last columns": (hybrid, "convolution_tail", last_columns),
    "one round too few": (hybrid, "solve_by_rounds", one_round_less),
    "chains run as text": (attention.TreePass, "build", chains_as_text),
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3_5", {"num_hidden_layers": 2}),
        pytest.param("granitemoehybrid", {}, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_recurrence_is_refused_at_load(
    hybrid_pair_of, monkeypatch, broken, name, settings
):
    monkeypatch.setattr(*BROKEN[broken])
    with pytest.raises(UnsupportedModelError, match=r"changes this model's logits|token by token"):
        load(*hybrid_pair_of(name, **settings), LoadConfig())


def test_states_that_are_not_written_are_refused(hybrid_pair_of, monkeypatch):
    monkeypatch.setattr(hybrid.RecurrentTreeCache, "__setitem__", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"^qwen3_5 models cannot run a draft tree: "):
        load(hybrid_pair_of("qwen3_5", num_hidden_layers=2)[0], None, LoadConfig())


def test_a_kernel_that_is_wrong_or_fails_is_dropped_with_one_line(see_device, monkeypatch):
    """There is no Metal here: a stand-in is wrong, or fails as a compiler does."""

    def fail(*args):
        raise RuntimeError("cannot compile\nline 1: error")

    see_device(mx.gpu)
    monkeypatch.setattr(hybrid, "runs_kernels", lambda: True)
    monkeypatch.setattr(metal_kernels, "VERDICTS", {})
    for kernel, reason in ((one_round_less, "its relative error is"), (fail, "cannot compile$")):
        monkeypatch.setattr(hybrid, "solve_by_substitution", kernel)
        with pytest.warns(UserWarning, match=f"without their Metal kernel: {reason}"):
            assert hybrid.choose_solver() is ROUNDS
    monkeypatch.setattr(hybrid, "solve_by_substitution", ROUNDS)
    assert hybrid.choose_solver() is ROUNDS
