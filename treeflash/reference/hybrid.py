"""Recurrent layers, one token after another with a state per node: the oracle of tree formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from treeflash.reference.numerics import Array, Ints, rms_norm, sigmoid, silu

L2_EPS = np.float32(1e-6)


@dataclass(frozen=True, eq=False)
class LayerState:
    """The state of a layer after a token."""

    tail: Array  # (kernel - 1, channels) the last inputs of the convolution
    matrix: Array  # (heads, key_dim, value_dim)

    @property
    def nbytes(self) -> int:
        return self.tail.nbytes + self.matrix.nbytes


Step: TypeAlias = Callable[[Array, LayerState], tuple[Array, LayerState]]


def run(step: Step, x: Array, parents: Ints, state: LayerState) -> tuple[Array, list[LayerState]]:
    """Run the `step` of a layer over (n, hidden_size) nodes, each from the state after its parent.

    `state` is the state after the committed sequence.
    """
    outputs: list[Array] = []
    states: list[LayerState] = []
    for row, parent in zip(x, parents.tolist(), strict=True):
        output, after = step(row, states[parent] if parent >= 0 else state)
        outputs.append(output)
        states.append(after)
    return np.stack(outputs), states


class RecurrentLayer:
    """The parts that both kinds of layers have."""

    heads: int
    key_dim: int
    value_dim: int

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Array], layer: str) -> None:
        self.eps = float(config["rms_norm_eps"])
        self.kernel = weights[layer + "conv1d.weight"][:, 0].T  # (width, channels)
        self.decay = np.exp(weights[layer + "A_log"])
        self.dt_bias = weights[layer + "dt_bias"]
        self.norm = weights[layer + "norm.weight"]
        self.out_proj = weights[layer + "out_proj.weight"]

    @property
    def start(self) -> LayerState:
        width, channels = self.kernel.shape
        matrix = np.zeros((self.heads, self.key_dim, self.value_dim), np.float32)
        return LayerState(np.zeros((width - 1, channels), np.float32), matrix)


class GatedDeltaNet(RecurrentLayer):
    """The layer of Qwen3.5 (arXiv 2412.06464, equation 10)."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Array], layer: str) -> None:
        self.key_heads = int(config["linear_num_key_heads"])
        self.heads = int(config["linear_num_value_heads"])
        self.key_dim = int(config["linear_key_head_dim"])
        self.value_dim = int(config["linear_value_head_dim"])
        layer += "linear_attn."
        super().__init__(config, weights, layer)
        self.projections = [weights[f"{layer}in_proj_{x}.weight"] for x in ("qkv", "z", "b", "a")]

    def __call__(self, x: Array, state: LayerState) -> tuple[Array, LayerState]:
        """Map one token's (hidden_size,) and the state before it to the same after it."""
        qkv, z, b, a = (projection @ x for projection in self.projections)
        window = np.concatenate([state.tail, qkv[None]])
        mixed = silu((window * self.kernel).sum(0))
        keys = self.key_heads * self.key_dim
        q, k, v = np.split(mixed, [keys, 2 * keys])
        q = self._per_value_head(q) / np.float32(np.sqrt(self.key_dim))
        k, v = self._per_value_head(k), v.reshape(self.heads, self.value_dim)
        decay = np.exp(-self.decay * softplus(a + self.dt_bias))
        matrix = decay[:, None, None] * state.matrix
        u = sigmoid(b)[:, None] * (v - np.einsum("hkv,hk->hv", matrix, k))
        matrix = matrix + k[:, :, None] * u[:, None, :]
        out = np.einsum("hkv,hk->hv", matrix, q)
        gated = rms_norm(out, self.norm, self.eps) * silu(z.reshape(out.shape))
        return self.out_proj @ gated.ravel(), LayerState(window[1:], matrix)

    def _per_value_head(self, x: Array) -> Array:
        """Return the (heads, key_dim) unit vectors; a key head serves consecutive value heads."""
        x = x.reshape(self.key_heads, self.key_dim)
        unit = np.asarray(x / np.sqrt((x * x).sum(-1, keepdims=True) + L2_EPS), np.float32)
        return unit.repeat(self.heads // self.key_heads, 0)


class Mamba2(RecurrentLayer):
    """The layer of Granite 4 (arXiv 2405.21060): keys are B, queries C, values x."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Array], layer: str) -> None:
        self.heads, self.value_dim = int(config["mamba_n_heads"]), int(config["mamba_d_head"])
        self.groups, self.key_dim = int(config["mamba_n_groups"]), int(config["mamba_d_state"])
        layer += "mamba."
        super().__init__(config, weights, layer)
        self.in_proj = weights[layer + "in_proj.weight"]
        self.bias = weights[layer + "conv1d.bias"]
        self.d = weights[layer + "D"]

    def __call__(self, x: Array, state: LayerState) -> tuple[Array, LayerState]:
        """Map one token's (hidden_size,) and the state before it to the same after it."""
        inner, channels = self.heads * self.value_dim, self.kernel.shape[1]
        z, xbc, dt = np.split(self.in_proj @ x, [inner, inner + channels])
        window = np.concatenate([state.tail, xbc[None]])
        mixed = silu((window * self.kernel).sum(0) + self.bias)
        values, k, q = np.split(mixed, [inner, inner + self.groups * self.key_dim])
        values = values.reshape(self.heads, self.value_dim)
        k, q = self._per_head(k), self._per_head(q)
        dt = softplus(dt + self.dt_bias)
        matrix = np.exp(-dt * self.decay)[:, None, None] * state.matrix
        matrix = matrix + k[:, :, None] * (dt[:, None] * values)[:, None, :]
        out = np.einsum("hkv,hk->hv", matrix, q) + self.d[:, None] * values
        gated = (out.ravel() * silu(z)).reshape(self.groups, -1)
        normalised = rms_norm(gated, np.ones_like(gated[0]), self.eps).ravel() * self.norm
        return self.out_proj @ normalised, LayerState(window[1:], matrix)

    def _per_head(self, x: Array) -> Array:
        """Return the (heads, key_dim); a group serves consecutive heads."""
        return x.reshape(self.groups, -1).repeat(self.heads // self.groups, 0)


def softplus(x: Array) -> Array:
    return np.asarray(np.logaddexp(x, 0), np.float32)
