"""Gated delta nets on draft trees, step by step.

`run_nodes` computes the outputs of all nodes of a tree, each on the state after its parent, and
keeps no states. `Steps.commit` computes the state after an accepted path from the inputs of its
nodes. Both do the operations of mlx-lm's kernel for single tokens in its order. If the compiler
contracts both kernels in the same way, the state of a node has the bits that plain decoding would
give it for the same inputs.

A simdgroup has one row of a state, which is in its registers while it walks through the tree depth
first. Where a node has several children, threadgroup memory keeps its row for the later ones. The
child that needs most memory comes last, so that few rows are kept at once: a tree that needs more
than `SLOTS` has at least 2 ** (SLOTS + 2) - 1 nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from treeflash_mlx.metal_kernels import make_kernel, padded

SLOTS = 6
MAX_KEY_DIM = 256  # for which the slots fill 24 KiB of threadgroup memory
LANES, ROWS = 32, 4  # lanes of a simdgroup, and simdgroups of a threadgroup

WALK = """
    constexpr int SHARE = Dk / 32;  // of a row, for each lane
    uint n = thread_position_in_grid.z, b = n / Hv, head = n % Hv, key_head = head / (Hv / Hk);
    uint row = thread_position_in_grid.y, own = thread_position_in_threadgroup.y;
    uint first = SHARE * thread_index_in_simdgroup;
    threadgroup float saved[SLOTS][ROWS][Dk];
    float state[SHARE];
    for (int i = 0; i < SHARE; ++i)
        state[i] = static_cast<float>(state_in[(n * Dv + row) * Dk + first + i]);
    uint nodes = k_shape[1], visits = counts[b];
    for (uint visit = 0; visit < visits; ++visit) {
        uint step = 3 * (b * order_shape[1] + visit), t = b * nodes + order[step];
        int from = order[step + 1], to = order[step + 2];
        if (from >= 0)
            for (int i = 0; i < SHARE; ++i)
                state[i] = saved[from][own][first + i];
        uint keys = (t * Hk + key_head) * Dk + first;
        float memory = 0.0f;
        for (int i = 0; i < SHARE; ++i) {
            state[i] = state[i] * g[GATE];
            memory += state[i] * static_cast<float>(k[keys + i]);
        }
        SUM(memory)
        float delta = (static_cast<float>(v[(t * Hv + head) * Dv + row]) - memory)
            * static_cast<float>(beta[t * Hv + head]);
        float output = 0.0f;
        for (int i = 0; i < SHARE; ++i) {
            state[i] = state[i] + static_cast<float>(k[keys + i]) * delta;
            OUTPUT
        }
        WRITE
        for (int i = 0; i < SHARE; ++i)
            state[i] = static_cast<float>(static_cast<StT>(state[i]));
        if (to >= 0)
            for (int i = 0; i < SHARE; ++i)
                saved[to][own][first + i] = state[i];
    }
    END
"""
SUMS = {
    False: "{0} = simd_sum({0});",
    # mlx-lm's kernel for wide keys writes its sums like this.
    True: "".join(f"{{0}} += simd_shuffle_xor({{0}}, {1 << i}); " for i in range(5)),
}
OUTPUTS = {
    "OUTPUT": "output += state[i] * static_cast<float>(q[keys + i]);",
    "WRITE": """SUM(output)
        if (thread_index_in_simdgroup == 0)
            y[(t * Hv + head) * Dv + row] = static_cast<InT>(output);""",
    "END": """for (uint t = visits; t < nodes; ++t)  // rows without a node
        if (thread_index_in_simdgroup == 0)
            y[((b * nodes + t) * Hv + head) * Dv + row] = static_cast<InT>(0.0f);""",
}
STATES = {
    "OUTPUT": "",
    "WRITE": "",
    "END": """for (int i = 0; i < SHARE; ++i)
        state_out[(n * Dv + row) * Dk + first + i] = static_cast<StT>(state[i]);""",
}
GATES = {3: "t * Hv + head", 4: "(t * Hv + head) * Dk + first + i"}
INPUTS = ("k", "v", "g", "beta", "state_in", "order", "counts")


@dataclass(frozen=True, eq=False)
class Steps:
    """The inputs of all nodes of a pass, in place of the states after them.

    Shapes: k (batch, n, key_heads, key_dim), v (batch, n, heads, value_dim), g (batch, n, heads) or
    (batch, n, heads, key_dim) float32 decays, beta (batch, n, heads).
    """

    k: mx.array
    v: mx.array
    g: mx.array
    beta: mx.array

    def commit(self, state: mx.array | None, nodes: mx.array, kept: mx.array) -> mx.array:
        """Compute the states after a path of each sequence, as `hybrid.Writes.commit` describes."""
        order = mx.stack([nodes, *[mx.full(nodes.shape, -1, mx.int32)] * 2], -1)
        return run_nodes(None, self, state, order, kept.sum(1).astype(mx.int32))


def run_nodes(
    q: mx.array | None, steps: Steps, state: mx.array | None, order: mx.array, counts: mx.array
) -> mx.array:
    """Return the (batch, n, heads, value_dim) outputs at all nodes; rows without a node are 0.

    Args:
        q: (batch, n, key_heads, key_dim); None for the states after the last nodes in the place of
            outputs.
        steps: of the nodes.
        state: (batch, heads, value_dim, key_dim) before the trees; None for zeros.
        order: (batch, n, 3) int32, see `treeflash.decoding.hybrid.depth_first`.
        counts: (batch,) int32 nodes of each tree.
    """
    batch, _, key_heads, key_dim = steps.k.shape
    heads, value_dim = steps.v.shape[2:]
    if state is None:
        state = mx.zeros((batch, heads, value_dim, key_dim), mx.float32)
    packed = _packs(steps, state)
    output, shape, dtype = "state_out", state.shape, state.dtype
    if q is not None:
        output, shape, dtype = "y", steps.v.shape, q.dtype
    template = {"StT": state.dtype, "Dk": key_dim, "Dv": value_dim}
    template |= {"Hk": key_heads, "Hv": heads, "SLOTS": SLOTS, "ROWS": ROWS}
    # MLX keeps one source for each name.
    kind = "by_channel" if steps.g.ndim == 4 else "packed" if packed else "by_head"
    name, inputs = f"gated_delta_replay_{kind}", list(INPUTS)
    walk = padded(order), padded(counts)
    arrays = [steps.k, steps.v, steps.g, steps.beta, state, *walk]
    if q is not None:
        name, inputs, arrays = f"gated_delta_nodes_{kind}", [*INPUTS, "q"], [*arrays, q]
        template["InT"] = q.dtype
    text = source(steps.g.ndim, packed=packed, outputs=q is not None)
    (result,) = make_kernel(name, inputs, [output], text)(
        inputs=arrays,
        template=list(template.items()),
        grid=(LANES, value_dim, batch * heads),
        threadgroup=(LANES, ROWS, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
    )
    return result


def source(gate_dims: int, *, packed: bool, outputs: bool) -> str:
    """Write the source for gates of `gate_dims` dimensions, with the packed kernel's sums or not.

    It writes outputs of nodes, or else the state after the last one.
    """
    text = WALK
    for name, part in (OUTPUTS if outputs else STATES).items():
        text = text.replace(name, part)
    for name in ("memory", "output"):
        text = text.replace(f"SUM({name})", SUMS[packed].format(name))
    return text.replace("GATE", GATES[gate_dims])


def _packs(steps: Steps, state: mx.array) -> bool:
    """Return whether mlx-lm runs its packed kernel for these shapes."""
    return (
        steps.g.ndim == 3
        and steps.k.shape[3] == 128
        and steps.v.shape[3] % 8 == 0
        and steps.g.dtype == state.dtype == mx.float32
    )


def runs_shape(key_dim: int) -> bool:
    """Return whether the kernel can run layers of this width of a key."""
    return key_dim % LANES == 0 and key_dim <= MAX_KEY_DIM
