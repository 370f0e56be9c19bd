"""Recurrent layers over trees: single steps along every path in float64, and faults at load."""

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.comparisons import path_to, random_tree

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from treeflash_mlx import attention, hybrid, metal_kernels
from treeflash_mlx.backend import load
from treeflash_mlx.hybrid import NodePaths, Writes, run_tree

HEADS, KEY_DIM, VALUE_DIM = 3, 16, 8
SIZES = (40, 7)  # nodes of two sequences: the smaller tree is padded
TOLERANCE = 2e-5  # of the largest entry
RULES = pytest.mark.parametrize("rule", ["delta", "delta by channel", "linear"])


class Inputs:
    """Random inputs of two trees, whose keys resemble each other, as a sequence's keys do."""

    def __init__(self, rng, rule):
        self.trees = [random_tree(rng, 0, n, 100) for n in SIZES]
        shape = len(SIZES), HEADS, max(SIZES)
        keys = rng.normal(size=(*shape, KEY_DIM)) + 1.5 * rng.normal(size=(1, HEADS, 1, KEY_DIM))
        self.keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
        self.queries = rng.normal(size=(*shape, KEY_DIM)) * KEY_DIM**-0.5
        self.values = rng.normal(size=(*shape, VALUE_DIM))
        channels = KEY_DIM if rule == "delta by channel" else 1
        # From hardly any decay to nearly all of the state.
        self.log_decays = -rng.exponential(rng.choice([1e-3, 0.1, 10.0], (*shape, channels)))
        self.betas = None if rule == "linear" else 2 * rng.random((*shape, 1))
        self.state = rng.normal(size=(len(SIZES), HEADS, VALUE_DIM, KEY_DIM))

    def step(self, sequence, node, state):
        """The output of a node and its state, from the state of its parent."""
        i = sequence, slice(None), node
        state = state * np.exp(self.log_decays[i])[:, None]
        write = self.values[i]
        if self.betas is not None:
            write = self.betas[i] * (write - np.einsum("hvk,hk->hv", state, self.keys[i]))
        state = state + write[..., None] * self.keys[i][:, None]
        return np.einsum("hvk,hk->hv", state, self.queries[i]), state

    def along(self, sequence, path):
        """The output of the last node of a path, and its state."""
        state = self.state[sequence]
        for node in path:
            output, state = self.step(sequence, node, state)
        return output, state

    def run(self):
        """(outputs, what a commit needs) of the backend, and its state."""
        names = "queries", "keys", "values", "log_decays", "state"
        q, k, v, g, state = (mx.array(getattr(self, name), mx.float32) for name in names)
        paths = NodePaths(self.trees, hybrid.solve_by_rounds)
        betas = None if self.betas is None else mx.array(self.betas, mx.float32)
        return *run_tree(q, k, v, g, state, paths, betas), state


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


def assert_outputs(inputs):
    outputs = np.array(inputs.run()[0])
    for sequence, tree in enumerate(inputs.trees):
        expected = [inputs.along(sequence, path_to(tree, node))[0] for node in range(len(tree))]
        assert_close(outputs[sequence, :, : len(tree)].swapaxes(0, 1), np.array(expected))


@RULES
def test_every_node_goes_on_from_its_parent(rng, rule):
    assert_outputs(Inputs(rng, rule))


@RULES
@pytest.mark.parametrize("keys_first", [False, True])
def test_a_commit_leaves_the_state_of_the_path(rng, rule, keys_first):
    """Of any length, in both sequences or in one of them."""
    inputs = Inputs(rng, rule)
    _, written, state = inputs.run()
    if keys_first:
        state = state.swapaxes(2, 3)
        written = Writes(written.values, written.keys, written.log_decays, keys_first=True)
    for last in (0, 5, 39):
        path = path_to(inputs.trees[0], last)
        kept = np.zeros((2, len(path)), np.bool_)
        kept[0] = True
        found = np.array(
            written.commit(state, mx.array(np.stack([path, path * 0])), mx.array(kept))
        )
        if keys_first:
            found = found.swapaxes(2, 3)
        assert_close(found[0], inputs.along(0, path)[1])
        if last == 5:  # the first states are zeros
            args = mx.array(np.stack([path, path * 0])), mx.array(kept)
            zeros = written.commit(mx.zeros_like(state), *args)
            np.testing.assert_array_equal(written.commit(None, *args), zeros)
        np.testing.assert_array_equal(found[1], inputs.state[1].astype(np.float32))


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
        # Its passes take longer. The functions that are broken run in both types.
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
