"""A decoder-only model in NumPy: Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Qwen3.5, Granite 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.interfaces import StateArrays
from treeflash.drafters.adapter import LowRankUpdate, read_adapter, refuse_module
from treeflash.drafters.backbone import inverse_frequencies, rope_parameters
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash.reference.hybrid import GatedDeltaNet, LayerState, Mamba2, run
from treeflash.reference.numerics import (
    Array,
    Ints,
    attention,
    linear,
    rms_norm,
    rotate,
    sigmoid,
    silu,
    softmax,
)

States = Mapping[int, LayerState]


class NodeOutputs(NamedTuple):
    """The outputs of a pass over n nodes."""

    layers: list[Array]  # (n, hidden_size) of the embeddings, of each layer and of the final norm
    states: dict[int, list[LayerState]]  # states of recurrent layers after each node, by layer


class Cache:
    """Per layer, the keys and values or the states of the committed positions and of a block.

    Attributes:
        start: by layer, the first states of the recurrent layers.
        pending: keys and values of the block.
        slots: the attention layers' places in `committed` and `pending`, by layer.
        states: of each recurrent layer after the committed positions, by layer.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, start: States | None = None
    ) -> None:
        self.start = start or {}
        empty = np.zeros((kv_heads, 0, head_dim), np.float32)
        attending = [n for n in range(layers) if n not in self.start]
        self.slots = {n: slot for slot, n in enumerate(attending)}
        self.committed: list[tuple[Array, Array]] = [(empty, empty) for _ in attending]
        self.pending = list(self.committed)
        self.states = self.start

    @property
    def length(self) -> int:
        return int(self.committed[0][0].shape[1])

    @property
    def nbytes(self) -> int:
        """Size of the committed keys and values, bytes."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.committed)

    def attend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Hold (kv_heads, n, head_dim) keys and values; returns them after the committed ones."""
        slot = self.slots[layer]
        self.pending[slot] = (k, v)
        keys, values = self.committed[slot]
        return np.concatenate([keys, k], 1), np.concatenate([values, v], 1)

    def commit(self, rows: Ints) -> None:
        """Keep these rows of the block held last, in this order."""
        self.committed = [
            (np.concatenate([keys, k[:, rows]], 1), np.concatenate([values, v[:, rows]], 1))
            for (keys, values), (k, v) in zip(self.committed, self.pending, strict=True)
        ]

    def truncate(self, length: int) -> None:
        self.copy_from(self, length)

    def copy_from(self, other: Cache, length: int) -> None:
        """Take over the first keys and values of another cache."""
        self.committed = [(k[:, :length].copy(), v[:, :length].copy()) for k, v in other.committed]

    def export(self, first: int, stop: int) -> StateArrays:
        return {
            f"{slot}.{name}": x[:, first:stop].copy()
            for slot, pair in enumerate(self.committed)
            for name, x in zip("kv", pair, strict=True)
        }

    def load(self, arrays: StateArrays, length: int) -> None:
        self.committed = [
            (
                np.concatenate([k, arrays[f"{slot}.k"]], 1),
                np.concatenate([v, arrays[f"{slot}.v"]], 1),
            )
            for slot, (k, v) in enumerate(self.committed)
        ]

    def close(self) -> None:
        self.truncate(0)

    def read(self) -> Array:
        """Read the target's keys and values, (attention layers, 2, kv_heads, length, head_dim)."""
        return np.array(self.committed, np.float32)


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_5", "granitemoehybrid")
RECURRENT_LAYERS = {"linear_attention", "mamba"}
MULTIPLIERS = "embedding_multiplier", "residual_multiplier", "logits_scaling"


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the language model in a `config.json`, with the outer model type."""
    return {**config, **config.get("text_config", {}), "model_type": config.get("model_type")}


def is_supported(config: Mapping[str, Any]) -> bool:
    """Return whether the reference computes this variant of a family."""
    if config["model_type"] not in FAMILIES or config.get("hidden_act", "silu") != "silu":
        return False
    if config["model_type"] != "granitemoehybrid":
        return True
    plain = all(config.get(name) in (1, None) for name in MULTIPLIERS)
    return plain and not config.get("num_local_experts") and not config.get("mamba_proj_bias")


def recurrent_layers(config: Mapping[str, Any], layers: int) -> list[bool]:
    kinds = config.get("layer_types")
    if kinds is None and config["model_type"] == "qwen3_5":
        interval = int(config.get("full_attention_interval", 4))
        return [bool((n + 1) % interval) for n in range(layers)]
    return [kind in RECURRENT_LAYERS for kind in kinds or [""] * layers]


def plain_weights(config: Mapping[str, Any], weights: dict[str, Array]) -> dict[str, Array]:
    """Return the weights under Llama's names."""
    if config["model_type"] == "qwen3_5":
        plain = {}
        for name, x in weights.items():
            # All norms but the norms of recurrent layers store their weight minus 1.
            shifted = name.endswith("norm.weight") and "linear_attn" not in name
            plain[name.replace("model.language_model.", "model.")] = (
                x + np.float32(1) if shifted else x
            )
        return plain
    if config["model_type"] == "granitemoehybrid":
        plain = {}
        for name, x in weights.items():
            layer, _, part = name.partition("shared_mlp.")
            if part == "input_linear.weight":
                gate_up = layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight"
                plain |= dict(zip(gate_up, np.split(x, 2), strict=True))
            else:
                plain[layer + "mlp.down_proj.weight" if part else name] = x
        return plain
    return weights


def _merge(tensors: dict[str, Any], updates: Sequence[LowRankUpdate]) -> None:
    """Add an adapter to the weights of its layers; raises what `read_adapter` does."""
    for update in updates:
        weight = tensors.get(f"{update.name}.weight")
        if weight is None or weight.shape != update.shape:
            raise refuse_module(update.name, f"the target has no weight of shape {update.shape}")
        tensors[f"{update.name}.weight"] = weight.astype(np.float32) + update.delta()


class Weights(dict[str, Array]):
    """The tensors of a folder by name; a CheckpointError for one that is missing."""

    def __init__(self, folder: Path, tensors: Mapping[str, Array]) -> None:
        super().__init__(tensors)
        self.folder = folder

    def __missing__(self, name: str) -> Array:
        raise CheckpointError(f"{self.folder} lacks the tensor {name}")


class Target:
    """The weights of a target, read from a Hugging Face folder, and its forward pass.

    A CheckpointError is raised if the folder is damaged or lacks a tensor, an UnsupportedModelError
    if the family or its variant is not supported. `column_nbytes` are the bytes of the keys and
    values of one position in all layers, `states_nbytes` the bytes of a sequence's recurrent
    states.
    """

    dtype = "float32"

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        config = text_config(read_config(folder))
        if not is_supported(config):
            kind = config["model_type"]
            found = f"this variant of {kind}" if kind in FAMILIES else repr(kind)
            raise UnsupportedModelError(
                f"the reference backend supports {', '.join(FAMILIES)}, not {found}; use the cuda "
                "or mlx backend"
            )
        tensors = read_tensors(folder)
        if adapter is not None:
            _merge(tensors, read_adapter(adapter))
        self.weights = Weights(folder, plain_weights(config, tensors))
        try:
            self._configure(config)
        except KeyError as error:
            raise CheckpointError(f"{folder / 'config.json'} lacks {error}") from error
        self.embeddings = self.weights["model.embed_tokens.weight"]
        # As in transformers, a head counts that is stored beside tied embeddings.
        tied = config.get("tie_word_embeddings", False) and "lm_head.weight" not in self.weights
        self.lm_head = self.embeddings if tied else self.weights["lm_head.weight"]

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
        # Of these families, only this one reads the setting in transformers.
        share = rope["partial_rotary_factor"] if config["model_type"] == "qwen3_5" else 1
        frequencies, self.rope_scale = inverse_frequencies(rope, int(self.head_dim * share))
        self.inv_freq = tuple(frequencies.tolist())
        self.windows = sliding_windows(config, self.layers)
        kind = GatedDeltaNet if config["model_type"] == "qwen3_5" else Mamba2
        self.recurrent = {
            n: kind(config, self.weights, f"model.layers.{n}.")
            for n, recurrent in enumerate(recurrent_layers(config, self.layers))
            if recurrent
        }
        attending = self.layers - len(self.recurrent)
        self.column_nbytes = 2 * attending * self.kv_heads * self.head_dim * 4
        self.states_nbytes = sum(layer.start.nbytes for layer in self.recurrent.values())

    def new_cache(self) -> Cache:
        start = {n: layer.start for n, layer in self.recurrent.items()}
        return Cache(self.layers, self.kv_heads, self.head_dim, start)

    def forward(
        self, token_ids: Ints, positions: Ints, mask: NDArray[np.bool_], cache: Cache
    ) -> tuple[Array, NodeOutputs]:
        """Run n tokens at absolute positions after the committed ones; they attend to all of these.

        The (n, n) mask says whether a token attends to another. The cache holds the tokens' keys
        and values afterwards, uncommitted. Returns (n, vocab) logits, and the outputs.
        """
        keys = np.concatenate([np.arange(cache.length), positions])
        parents = nearest_ancestors(mask)
        seen = np.concatenate([np.ones((len(mask), cache.length), np.bool_), mask], 1)
        x = self.embeddings[token_ids]
        outputs, states = [x], {}
        for n, window in enumerate(self.windows):
            inside = seen if window is None else seen & (positions[:, None] - keys < window)
            layer = f"model.layers.{n}."
            y = rms_norm(x, self.weights[layer + "input_layernorm.weight"], self.eps)
            if n in self.recurrent:
                mixed, states[n] = run(self.recurrent[n], y, parents, cache.states[n])
                x = x + mixed
            else:
                x = x + self._attend(n, y, positions, inside, cache)
            y = rms_norm(x, self.weights[layer + "post_attention_layernorm.weight"], self.eps)
            x = x + self._feed_forward(layer + "mlp.", y)
            outputs.append(x)
        hidden = rms_norm(x, self.weights["model.norm.weight"], self.eps)
        return hidden @ self.lm_head.T, NodeOutputs([*outputs, hidden], states)

    def _attend(
        self, n: int, x: Array, positions: Ints, mask: NDArray[np.bool_], cache: Cache
    ) -> Array:
        layer = f"model.layers.{n}.self_attn."

        def heads(name: str, y: Array) -> Array:
            y = y.reshape(len(x), -1, self.head_dim)
            if f"{layer}{name}_norm.weight" in self.weights:
                y = rms_norm(y, self.weights[f"{layer}{name}_norm.weight"], self.eps)
            y = y.swapaxes(0, 1)
            return y if name == "v" else rotate(y, positions, self.inv_freq, self.rope_scale)

        q, k, v = (linear(self.weights, f"{layer}{name}_proj", x) for name in "qkv")
        gate = None
        if q.shape[1] > self.heads * self.head_dim:  # Qwen3.5 gates the outputs of its heads
            q, gate = np.split(q.reshape(len(x), self.heads, -1), 2, -1)
        keys, values = cache.attend(n, heads("k", k), heads("v", v))
        out = attention(heads("q", q), keys, values, mask, self.score_scale)
        if gate is not None:
            out = out * sigmoid(gate.reshape(out.shape))
        return linear(self.weights, layer + "o_proj", out)

    def _feed_forward(self, layer: str, x: Array) -> Array:
        if layer + "gate.weight" not in self.weights:
            return self._mlp(layer, x)
        scores = softmax(x @ self.weights[layer + "gate.weight"].T)
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
        gate, up = (linear(self.weights, f"{layer}{name}_proj", x) for name in ("gate", "up"))
        return linear(self.weights, layer + "down_proj", silu(gate) * up)


def nearest_ancestors(mask: NDArray[np.bool_]) -> Ints:
    """Return the (n,) int32 parents of the nodes of an ancestor mask."""
    order = np.arange(len(mask), dtype=np.int32)
    return np.asarray(np.where(mask & (order < order[:, None]), order, -1).max(-1), np.int32)


def sliding_windows(config: dict[str, Any], layers: int) -> list[int | None]:
    """Return each layer's window in positions, or None; the defaults are those in transformers.

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
