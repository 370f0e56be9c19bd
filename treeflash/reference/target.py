"""A decoder-only model in NumPy: Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Qwen3.5, Granite 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.drafters.folder import read_config, read_tensors
from treeflash.drafters.rope import inverse_frequencies, rope_parameters
from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash.reference.cache import Cache
from treeflash.reference.families import (
    FAMILIES,
    is_supported,
    plain_weights,
    recurrent_layers,
    text_config,
)
from treeflash.reference.numerics import (
    Array,
    attention,
    rms_norm,
    rotate,
    sigmoid,
    silu,
    softmax,
)
from treeflash.reference.recurrence import GatedDeltaNet, Mamba2, run


class Target:
    """The weights of a target and its forward pass."""

    def __init__(self, folder: Path) -> None:
        """Read a Hugging Face folder.

        Raises:
            CheckpointError: it is damaged or lacks a tensor.
            UnsupportedModelError: another family, or a variant of one that is not supported.
        """
        config = text_config(read_config(folder))
        if not is_supported(config):
            raise UnsupportedModelError(
                f"the reference backend supports {', '.join(FAMILIES)}, not "
                f"{config['model_type']!r}; use --backend cuda or --backend mlx"
            )
        self.folder = folder
        self.weights = plain_weights(config, read_tensors(folder))
        try:
            self._configure(config)
        except KeyError as error:
            raise CheckpointError(f"{folder / 'config.json'} lacks {error}") from error
        self.embeddings = self._weight("model.embed_tokens.weight")
        self.lm_head = self.embeddings
        if not config.get("tie_word_embeddings", False):
            self.lm_head = self._weight("lm_head.weight")

    def _configure(self, config: dict[str, Any]) -> None:
        self.hidden_size = int(config["hidden_size"])
        self.layers = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head_dim = int(config.get("head_dim") or self.hidden_size // self.heads)
        self.vocab_size = int(config["vocab_size"])
        self.max_positions = int(config["max_position_embeddings"])
        self.eps = float(config["rms_norm_eps"])
        self.experts_per_token = int(config.get("num_experts_per_tok") or 0)
        self.norm_topk_prob = bool(config.get("norm_topk_prob", False))
        self.score_scale = float(config.get("attention_multiplier") or self.head_dim**-0.5)
        rope = rope_parameters(config)
        rotated = int(self.head_dim * rope.get("partial_rotary_factor", 1))
        frequencies, self.rope_scale = inverse_frequencies(rope, rotated)
        self.inv_freq = tuple(frequencies.tolist())
        self.windows = sliding_windows(config, self.layers)
        kind = GatedDeltaNet if config["model_type"] == "qwen3_5" else Mamba2
        self.recurrent = {
            n: kind(config, self.weights, f"model.layers.{n}.")
            for n, recurrent in enumerate(recurrent_layers(config, self.layers))
            if recurrent
        }

    def embed(self, token_ids: NDArray[np.int32]) -> Array:
        """(..., hidden_size) embeddings of (...) tokens."""
        rows: Array = self.embeddings[token_ids]
        return rows

    def output_head(self, hidden: Array) -> Array:
        """(..., vocab) logits of (..., hidden_size) normalised hidden states."""
        logits: Array = hidden @ self.lm_head.T
        return logits

    def new_cache(self) -> Cache:
        """An empty cache for a new text."""
        start = {n: layer.start for n, layer in self.recurrent.items()}
        return Cache(self.layers, self.kv_heads, self.head_dim, start)

    def forward(
        self,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        mask: NDArray[np.bool_],
        cache: Cache,
    ) -> tuple[Array, list[Array]]:
        """Run n tokens after the committed ones.

        Args:
            token_ids: (n,).
            positions: (n,) absolute.
            mask: (n, n) bool; whether a token attends to another. All attend to the committed ones.
            cache: holds the tokens' keys and values afterwards, uncommitted.

        Returns:
            (n, vocab) logits, and (n, hidden_size) outputs of the embeddings and of each layer.
        """
        keys = np.concatenate([np.arange(cache.length), positions])
        parents = nearest_ancestors(mask)
        seen = np.concatenate([np.ones((len(mask), cache.length), np.bool_), mask], 1)
        x = self.embed(token_ids)
        outputs = [x]
        for n, window in enumerate(self.windows):
            inside = seen if window is None else seen & (positions[:, None] - keys < window)
            layer = f"model.layers.{n}."
            y = rms_norm(x, self._weight(layer + "input_layernorm.weight"), self.eps)
            if n in self.recurrent:
                mixed, cache.node_states[n] = run(self.recurrent[n], y, parents, cache.states[n])
                x = x + mixed
            else:
                x = x + self._attend(n, y, positions, inside, cache)
            y = rms_norm(x, self._weight(layer + "post_attention_layernorm.weight"), self.eps)
            x = x + self._feed_forward(layer + "mlp.", y)
            outputs.append(x)
        hidden = rms_norm(x, self._weight("model.norm.weight"), self.eps)
        return self.output_head(hidden), outputs

    def _attend(
        self,
        n: int,
        x: Array,
        positions: NDArray[np.int32],
        mask: NDArray[np.bool_],
        cache: Cache,
    ) -> Array:
        layer = f"model.layers.{n}.self_attn."

        def heads(name: str, y: Array) -> Array:
            y = y.reshape(len(x), -1, self.head_dim)
            if f"{layer}{name}_norm.weight" in self.weights:
                y = rms_norm(y, self.weights[f"{layer}{name}_norm.weight"], self.eps)
            return y.swapaxes(0, 1)

        q, k, v = (self._linear(f"{layer}{name}_proj", x) for name in "qkv")
        gate = None
        if q.shape[1] > self.heads * self.head_dim:  # Qwen3.5 gates what its heads return
            q, gate = np.split(q.reshape(len(x), self.heads, -1), 2, -1)
        queries = self._rotate(heads("q", q), positions)
        keys, values = cache.attend(n, self._rotate(heads("k", k), positions), heads("v", v))
        out = attention(queries, keys, values, mask, self.score_scale)
        if gate is not None:
            out = out * sigmoid(gate.reshape(out.shape))
        return self._linear(layer + "o_proj", out)

    def _rotate(self, x: Array, positions: NDArray[np.int32]) -> Array:
        """Rotate the first channels of each head, as many as there are frequencies for."""
        rotated, kept = np.split(x, [2 * len(self.inv_freq)], -1)
        rotated = rotate(rotated, positions, self.inv_freq, self.rope_scale)
        return np.concatenate([rotated, kept], -1)

    def _feed_forward(self, layer: str, x: Array) -> Array:
        if layer + "gate.weight" not in self.weights:
            return self._mlp(layer, x)
        scores = softmax(x @ self._weight(layer + "gate.weight").T)
        chosen = np.argsort(-scores, axis=-1, kind="stable")[:, : self.experts_per_token]
        out = np.zeros_like(x)
        for row, experts in enumerate(chosen):
            shares = scores[row, experts]
            if self.norm_topk_prob:
                shares = shares / shares.sum()
            for expert, share in zip(experts.tolist(), shares, strict=True):
                out[row] += share * self._mlp(f"{layer}experts.{expert}.", x[row])
        return out

    def _mlp(self, layer: str, x: Array) -> Array:
        gate = silu(self._linear(layer + "gate_proj", x))
        return self._linear(layer + "down_proj", gate * self._linear(layer + "up_proj", x))

    def _linear(self, name: str, x: Array) -> Array:
        y: Array = x @ self._weight(name + ".weight").T
        bias = self.weights.get(name + ".bias")
        return y if bias is None else y + bias

    def _weight(self, name: str) -> Array:
        try:
            return self.weights[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} lacks the tensor {name}") from None


def nearest_ancestors(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """(n,) int32 parents of the nodes that an ancestor mask describes."""
    order = np.arange(len(mask), dtype=np.int32)
    parents: NDArray[np.int32] = np.where(mask & (order < order[:, None]), order, -1).max(-1)
    return parents


def sliding_windows(config: dict[str, Any], layers: int) -> list[int | None]:
    """Each layer's window in positions, or None; the defaults are those of transformers.

    Mistral has a window in every layer unless `sliding_window` is null. The Qwen families have one
    only if `use_sliding_window` is set, Qwen2 and Qwen3 from layer `max_window_layers` on.
    """
    family = config["model_type"]
    window = config.get("sliding_window", 4096)
    if family == "llama" or (family != "mistral" and not config.get("use_sliding_window", False)):
        window = None
    kinds = config.get("layer_types")
    if kinds is not None:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    first = config.get("max_window_layers", 28) if family in ("qwen2", "qwen3") else 0
    return [window if n >= first else None for n in range(layers)]
