"""The transformer layer that Llama targets and DFlash drafters have in common."""

import numpy as np

from treeflash.decoding.logit_tables import log_softmax
from treeflash.errors import CheckpointError


class Weights(dict):
    """Tensors by name; a missing one is the checkpoint's fault."""

    def __init__(self, folder, tensors):
        super().__init__(tensors)
        self.folder = folder

    def __missing__(self, name):
        raise CheckpointError(f"{self.folder} lacks the tensor {name}")


class Layer:
    def __init__(self, weights, prefix, *, heads, kv_heads, head_dim, eps, inv_freq, scale):
        self.weights, self.prefix, self.eps = weights, prefix, eps
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.inv_freq, self.scale = np.array(inv_freq), scale

    def norm(self, name, x):
        return rms_norm(x, self.weights[f"{self.prefix}{name}.weight"], self.eps)

    def linear(self, name, x):
        y = x @ self.weights[f"{self.prefix}{name}.weight"].T
        bias = f"{self.prefix}{name}.bias"
        return y + self.weights[bias] if bias in self.weights else y

    def project(self, name, x, positions):
        """(heads, n, head_dim) queries or keys, normalised where the layer does, and rotated."""
        y = self.linear(f"self_attn.{name}_proj", x).reshape(len(x), -1, self.head_dim)
        if f"{self.prefix}self_attn.{name}_norm.weight" in self.weights:
            y = self.norm(f"self_attn.{name}_norm", y)
        angles = positions[:, None] * self.inv_freq
        turn = (np.exp(1j * angles) * self.scale).astype(np.complex64)[:, None]
        first, second = np.split(y, 2, -1)
        turned = (first + 1j * second) * turn
        return np.concatenate([turned.real, turned.imag], -1).swapaxes(0, 1)

    def keys_and_values(self, x, positions):
        """(2, kv_heads, n, head_dim)."""
        values = self.linear("self_attn.v_proj", x).reshape(len(x), self.kv_heads, -1)
        return np.stack([self.project("k", x, positions), values.swapaxes(0, 1)])

    def __call__(self, x, positions, cached, mask):
        """The layer's output, and the keys and values of x.

        Args:
            x: (n, hidden_size).
            positions: (n,).
            cached: (2, kv_heads, m, head_dim).
            mask: (n, m + n), True where a query sees a key.
        """
        y = self.norm("input_layernorm", x)
        mine = self.keys_and_values(y, positions)
        keys, values = np.repeat(
            np.concatenate([cached, mine], 2), self.heads // self.kv_heads, axis=1
        )
        scores = self.project("q", y, positions) @ keys.swapaxes(1, 2)
        scores = np.where(mask, scores / np.float32(self.head_dim**0.5), -np.inf)
        mixed = np.exp(log_softmax(scores)) @ values
        x = x + self.linear("self_attn.o_proj", mixed.swapaxes(0, 1).reshape(len(x), -1))
        y = self.norm("post_attention_layernorm", x)
        y = silu(self.linear("mlp.gate_proj", y)) * self.linear("mlp.up_proj", y)
        return x + self.linear("mlp.down_proj", y), mine


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * weight


def silu(x):
    return x / (1 + np.exp(-x))
