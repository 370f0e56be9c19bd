"""Gated delta nets on draft trees: the Metal kernels, and how they are chosen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeflash.decoding.hybrid import depth_first, most_kept
from treeflash.decoding.tree import DraftTree
from treeflash.testing import require
from treeflash.testing.pairs import EXAMPLES, repeated

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from metal_executor import ASCENDING, MetalKernelError
from mlx_lm.models import gated_delta
from stand_ins import stand_in
from treeflash_mlx import hybrid, metal_kernels
from treeflash_mlx.metal_kernels import gated_delta as kernels

PARENTS = [-1, 0, 1, 0, 1, 3, 3, 5]
SHAPE = (1, 2, 8, 32, mx.float32, False)  # of `delta_kernel_wins`


def random_arrays(rng, dtype, key_dim, by_channel, batch=2, n=8, heads=2, value_dim=8):
    def normal(*shape):
        return mx.array(rng.normal(size=shape).astype(np.float32))

    q, k = (normal(batch, n, 1, key_dim).astype(dtype) * key_dim**-0.5 for _ in range(2))
    gates = (batch, n, heads, key_dim) if by_channel else (batch, n, heads)
    steps = kernels.Steps(
        k,
        normal(batch, n, heads, value_dim).astype(dtype),
        mx.exp(-mx.abs(normal(*gates))),
        mx.sigmoid(normal(batch, n, heads)).astype(dtype),
    )
    return q, steps, normal(batch, heads, value_dim, key_dim)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("dtype", "key_dim", "by_channel"),
    [(mx.float32, 32, False), (mx.bfloat16, 128, False), (mx.float16, 64, True)],
)
def test_nodes_have_the_bits_of_plain_decoding(runner, rng, dtype, key_dim, by_channel):
    """Outputs of all nodes, and states after paths, of two trees of different sizes.

    A GPU's compiler may contract products and sums, so that there they are equal up to rounding.
    """
    q, steps, state = random_arrays(rng, dtype, key_dim, by_channel)
    trees = [
        DraftTree.from_parents(np.zeros(len(x), np.int32), np.array(x, np.int32))
        for x in (PARENTS, PARENTS[:3])
    ]
    paths = hybrid.NodePaths(trees, hybrid.solve_by_rounds)
    outputs = kernels.run_nodes(q, steps, state, *paths.visits)
    assert not outputs[1, 3:].any()
    assert outputs.dtype == dtype
    for row, tree in enumerate(trees):
        for node in range(len(tree)):
            path = [i for i in range(node + 1) if tree.ancestor_mask()[node, i]]
            after = state[row : row + 1]
            for i in path:
                token = (
                    x[row : row + 1, i : i + 1] for x in (q, steps.k, steps.v, steps.g, steps.beta)
                )
                output, after = gated_delta.gated_delta_kernel(*token, after)
            error = metal_kernels.relative_error(outputs[row, node], output[0, 0])
            assert error <= runner.rounding[dtype]
        chosen, kept = np.zeros((2, len(path) + 1), np.int32), np.zeros((2, len(path) + 1), bool)
        chosen[row, : len(path)], kept[row, : len(path)] = path, True
        replayed = steps.commit(state, mx.array(chosen), mx.array(kept))
        error = metal_kernels.relative_error(replayed[row], after[0])
        assert error <= runner.rounding[mx.float32]
        assert mx.array_equal(replayed[1 - row], state[1 - row])  # without a path


def test_states_in_half_precision_are_rounded_after_every_node(metal, rng):
    q, steps, state = random_arrays(rng, mx.float16, 32, by_channel=False, batch=1, n=3)
    state = state.astype(mx.float16)
    tree = DraftTree.chain(np.zeros(3, np.int32))
    paths = hybrid.NodePaths([tree], hybrid.solve_by_rounds)
    outputs, after = kernels.run_nodes(q, steps, state, *paths.visits), state
    for i in range(3):
        token = (x[:, i : i + 1] for x in (q, steps.k, steps.v, steps.g, steps.beta))
        output, after = gated_delta.gated_delta_kernel(*token, after)
        assert mx.array_equal(output[:, 0], outputs[:, i])
    replayed = steps.commit(state, mx.array([[0, 1, 2]]), mx.ones((1, 3), mx.bool_))
    assert mx.array_equal(replayed, after)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_nodes_by_the_kernel_decay_as_by_operations(metal, monkeypatch, rng, lower_bound):
    """With a gate per head; or per channel, whose decays have a bound."""
    monkeypatch.setattr(hybrid, "delta_kernel_wins", lambda *_: True)
    bounded = lower_bound is not None
    q, steps, state = random_arrays(rng, mx.float32, 32, by_channel=bounded, batch=1)
    tree = DraftTree.from_parents(np.zeros(8, np.int32), np.array(PARENTS, np.int32))
    paths = hybrid.NodePaths([tree], hybrid.solve_by_rounds)
    gate = (2, 32) if bounded else (2,)
    rate, bias = (mx.array(rng.normal(size=x), mx.float32) for x in ((2, 1)[: len(gate)], gate))
    arrays = q, steps.k, steps.v, mx.log(steps.g), steps.beta, rate, bias, state
    (outputs, written), (expected, _) = (
        hybrid.gated_delta_update(paths, *arrays, use_kernel=x, lower_bound=lower_bound)
        for x in (True, False)
    )
    assert isinstance(written, kernels.Steps)
    assert mx.allclose(outputs, expected, atol=1e-5)


@settings(repeated, max_examples=EXAMPLES or 100)
@given(st.lists(st.integers(0, 2**16), max_size=60))
def test_a_walk_finds_the_state_of_every_parent(numbers):
    parents = [-1, *(number % (i + 1) for i, number in enumerate(numbers))]
    order, count = depth_first(parents)
    assert sorted(order[:, 0]) == list(range(len(parents)))
    held, state = {}, -1  # by slot, and in registers, the node whose state it is
    for node, source, target in order.tolist():
        state = held[source] if source >= 0 else state
        assert state == parents[node]
        state = node
        if target >= 0:
            held[target] = node
    assert max(held, default=-1) + 1 == count
    assert len(parents) >= 2 ** (count + 1) - 1
    assert count <= most_kept(len(parents))


def test_a_full_binary_tree_needs_a_slot_for_each_depth(monkeypatch):
    parents = [-1, *((i - 1) // 2 for i in range(1, 127))]
    assert depth_first(parents)[1] == kernels.SLOTS == most_kept(127)
    tree = DraftTree.from_parents(
        np.zeros(255, np.int32), np.array([-1, *((i - 1) // 2 for i in range(1, 255))], np.int32)
    )
    assert depth_first(tree.parents)[1] == kernels.SLOTS + 1
    monkeypatch.setattr(hybrid, "runs_kernels", lambda: True)
    assert hybrid.NodePaths([tree], hybrid.solve_by_rounds).visits is None


FAULTS = {
    "no parent's state": ("if (from >= 0)", "if (false)"),
    "the state of another tree's branch": ("saved[from][own]", "saved[0][own]"),
    "a state that is never kept": ("if (to >= 0)", "if (to > 0)"),
    "rows of other threads": ("saved[to][own]", "saved[to][0]"),
    "no decay": ("state[i] * g[GATE]", "state[i]"),
    "the gate of another node": ("t * Hv + head", "head"),
    "the memory before the decay": ("memory += state[i] *", "memory += state[i] / g[GATE] *"),
    "one node too many": ("visit < visits", "visit <= visits"),
    "no sum": ("SUM(memory)", ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_the_kernel_is_noticed(metal, monkeypatch, recwarn, fault):
    """By the executor, or by the check at load."""
    metal.schedules, metal.speedup = (ASCENDING,), lambda *_: 2.0  # the others are slow
    assert fault[0] in kernels.WALK
    stand_in(monkeypatch, kernels, WALK=kernels.WALK.replace(*fault))
    try:
        assert not hybrid.delta_kernel_wins(*SHAPE)
    except MetalKernelError:
        return
    assert "gated delta nets on trees run without" in str(recwarn.pop().message)


def test_the_kernel_runs_where_it_wins(metal, recwarn):
    for speedup in (1.1, 1.2):
        hybrid.delta_kernel_wins.cache_clear()
        metal.speedup = lambda *_, x=speedup: x
        assert hybrid.delta_kernel_wins(*SHAPE) == (speedup > 1.15)
        assert metal_kernels.VERDICTS["gated delta nets on trees, 2 heads of 8 x 32"] == {
            "12 nodes": f"{'used' if speedup > 1.15 else 'not used'}, {speedup:.2f} times as fast "
            "as MLX's operation, same bits"
        }
        assert not hybrid.delta_kernel_wins(1, 2, 8, 48, mx.float32, False)  # not by lanes
    assert not recwarn.list


def test_a_contracted_kernel_is_right_and_has_other_bits(metal, recwarn):
    """A compiler decides whether a product and a sum are rounded once or twice."""
    twice = "state[i] + static_cast<float>(k[keys + i]) * delta;"
    once = "fma(static_cast<float>(k[keys + i]), delta, state[i]);"
    metal.faults.append(("treeflash_gated_delta", twice, once))
    metal.speedup = lambda *_: 2.0
    assert hybrid.delta_kernel_wins(*SHAPE)
    (verdict,) = metal_kernels.VERDICTS["gated delta nets on trees, 2 heads of 8 x 32"].values()
    assert verdict == "used, 2.00 times as fast as MLX's operation, other bits"
    assert metal.planted
    assert not recwarn.list


def test_the_kernels_are_timed_against_operations(metal):
    """Both give the same states and outputs."""
    seen = []

    def speedup(kernel, plain, start):
        seen.append(mx.abs(kernel(start, 0) - plain(start, 0)).max().item())
        return 2.0

    metal.speedup = speedup
    for shape in (SHAPE, (2, 2, 4, 64, mx.float32, True)):
        assert hybrid.delta_kernel_wins(*shape)
    assert max(seen) < 1e-5
