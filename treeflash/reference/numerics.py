"""The operations of a transformer, in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Ints = NDArray[np.int32]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Normalise the last axis to unit root mean square, then scale by `weight`."""
    root: Array = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    return x / root * weight


def linear(tensors: Mapping[str, Array], name: str, x: Array) -> Array:
    """Return the (..., out) from (..., in), with a bias if the layer has one."""
    y: Array = x @ tensors[name + ".weight"].T
    bias = tensors.get(name + ".bias")
    return y if bias is None else y + bias


def silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)), np.float32)


def gelu_tanh(x: Array) -> Array:
    """Compute GELU by its approximation with a hyperbolic tangent."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
    return np.asarray(x / 2 * (1 + np.tanh(inner)), np.float32)


def softmax(x: Array) -> Array:
    """Compute the softmax over the last axis; a row may have -inf entries, but not only."""
    exps = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(exps / exps.sum(-1, keepdims=True), np.float32)


def log_softmax(x: Array) -> Array:
    """Compute the log softmax over the last axis."""
    shifted = x - x.max(-1, keepdims=True)
    normalised: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised


def rotate(x: Array, positions: Ints, inv_freq: Sequence[float], scale: float) -> Array:
    """Rotate (heads, n, head_dim): the first two channels for each frequency.

    The halves of these channels are paired. Frequencies are in radians per position; `scale`
    multiplies cosines and sines.
    """
    angles = positions[:, None] * np.asarray(inv_freq)
    cos, sin = np.float32(np.cos(angles) * scale), np.float32(np.sin(angles) * scale)
    first, second, rest = np.split(x, [len(inv_freq), 2 * len(inv_freq)], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: NDArray[np.bool_],
    scale: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """Return the (n, heads * value_dim) grouped-query attention of (heads, n, head_dim) queries.

    Keys are (kv_heads, m, head_dim), values (kv_heads, m, value_dim), and the (n, m) mask is true
    if a query attends to a key. `scale` multiplies the scores; None is 1 / sqrt(head_dim). The
    (heads,) `sinks` are scores of one more key, whose value is zero.
    """
    heads, n, head_dim = q.shape
    grouped = q.reshape(len(k), -1, n, head_dim)
    scores = grouped @ k[:, None].swapaxes(-1, -2) * np.float32(scale or head_dim**-0.5)
    scores = np.where(mask, scores, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(sinks.reshape(len(k), -1, 1, 1), (*scores.shape[:-1], 1))
        scores = np.concatenate([scores, column], -1)
    out = softmax(scores)[..., : k.shape[1]] @ v[:, None]
    return out.reshape(heads, n, -1).swapaxes(0, 1).reshape(n, -1)


def visible(queries: Ints, keys: Ints, window: int | None, causal: bool) -> NDArray[np.bool_]:
    """Return (n, m) bool; whether one of (n,) query positions attends to one of (m,) key positions.

    If `causal`, a query attends only to itself and earlier positions, and in any case to fewer than
    `window` positions on each side; None is all.
    """
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0 if causal else np.ones(distance.shape, np.bool_)
    if window is not None:
        seen &= np.abs(distance) < window
    return seen


def block_visible(queries: Ints, keys: Ints, window: int | None, causal: bool) -> NDArray[np.bool_]:
    """Return `visible` with a window before the first query: all queries see one context."""
    seen = visible(queries, keys, None, causal)
    if window is not None:
        seen &= keys >= queries[0] - window
    return seen


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)), np.float32)


def top(logits: Array, k: int) -> tuple[Ints, Array]:
    """Return the `k` largest of each row, ties by index, and their log probabilities."""
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    return order.astype(np.int32), np.take_along_axis(log_softmax(logits), order, -1)


def best_children(
    paths: NDArray[np.float64], log_probs: Array, width: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Choose the children that become the paths of the next depth, at most `width`, best first.

    They are indices into the n * K children of (n,) paths, whose log probabilities are (n, K).
    Returns the log probabilities of the paths to them too. The first child is the chain's, which
    must not end here.
    """
    children = (paths[:, None] + log_probs).ravel()
    ranks = children.copy()
    ranks[0] = np.inf
    kept = np.argsort(-ranks, kind="stable")[:width]
    return kept, children[kept]
