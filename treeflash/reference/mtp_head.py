"""Heads that draft depth by depth; see `treeflash.drafters.mtp_heads`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.backend_base import OneByOneDrafter, OneByOneHead
from treeflash.decoding.interfaces import StateArrays, TableOptions
from treeflash.decoding.output_stage import Block
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.mtp_heads import MAX_PATHS, NO_MARGINALS, Latent, MtpConfig, MtpExperts
from treeflash.errors import ConfigError
from treeflash.reference.drafter import Drafter
from treeflash.reference.drafter_model import DrafterModel
from treeflash.reference.numerics import (
    Array,
    Ints,
    attention,
    best_children,
    log_softmax,
    rotate,
    sigmoid,
    silu,
    softmax,
    top,
    visible,
)
from treeflash.reference.target import Cache
from treeflash.reference.verifier import State


class MtpCache(Cache):
    """The rows of one sequence, and the target's (length, hidden_size) states that they read.

    The row of the last position holds the token after it, which is not committed: it is computed
    again for every draft.
    """

    def __init__(self, config: MtpConfig) -> None:
        layers = config.num_hidden_layers
        super().__init__(layers, config.num_key_value_heads, config.head_dim)
        if config.latent is not None:
            widths = config.latent.rank, config.head_dim
            latents, keys = (np.zeros((1, 0, width), np.float32) for width in widths)
            self.committed = [(latents, keys)] * layers
        self.hidden: Array = np.zeros((0, config.hidden_size), np.float32)

    @property
    def length(self) -> int:
        return len(self.hidden)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.hidden.nbytes

    def append(self, model: MtpModel, state: State) -> None:
        """Note the states of the positions that were committed since the last draft."""
        if state.context:
            hidden = model.project(np.concatenate(state.context))
            self.hidden, state.context = np.concatenate([self.hidden, hidden]), []

    def copy_from(self, other: Cache, length: int) -> None:
        assert isinstance(other, MtpCache)
        super().copy_from(other, max(min(length, other.length) - 1, 0))
        self.hidden = other.hidden[:length].copy()

    def export(self, first: int, stop: int) -> StateArrays:
        """Export all rows but the last position's: it depends on the token after it."""
        rows = super().export(max(first - 1, 0), max(stop - 1, 0))
        return rows | {"hidden": self.hidden[first:stop].copy()}

    def load(self, arrays: StateArrays, length: int) -> None:
        super().load(arrays, length)
        self.hidden = np.concatenate([self.hidden, arrays["hidden"]])


@dataclass(frozen=True, eq=False)
class MtpModel(DrafterModel):
    """The tensors of an MTP head, with the target that it drafts for."""

    config: MtpConfig

    def new_cache(self) -> MtpCache:
        return MtpCache(self.config)

    def project(self, features: Array) -> Array:
        """Project (n, features * hidden_size) target outputs to (n, hidden_size) states."""
        if self.config.final_state:
            return features
        if self.config.feature_norms == "all":
            features = self.normed("input_norm", features)
        if self.config.feature_norms == "each":
            parts = np.split(features, len(self.config.target_layer_ids), -1)
            parts = [self.normed(f"fc_norm.{i}", part) for i, part in enumerate(parts)]
            features = np.concatenate(parts, -1)
        return self.linear("fc", features)

    def read(self, tokens: Ints, states: Array) -> tuple[Array, Array]:
        """Compute attention's input and residual from (n,) tokens and (n, hidden_size) states."""
        normed = self.normed("hidden_norm", states)
        embedded = self.embed(tokens) * np.float32(self.config.input_scale)
        both = np.concatenate([self.normed("embedding_norm", embedded), normed], -1)
        if self.config.reads_both:
            return both, normed if self.config.normed_residual else states
        x = self.linear("input_proj", both)
        return self.normed("layer.input_layernorm", x), x

    def layer(
        self,
        read: tuple[Array, Array],
        positions: Ints,
        keys: Array,
        values: Array,
        mask: NDArray[np.bool_],
        layer: str = "layer.",
    ) -> Array:
        """Return (n, hidden_size) outputs of n rows, which attend to m keys by an (n, m) mask.

        The keys and values are what `keys_and_values` returns.
        """
        y, x = read
        gate = None
        if (latent := self.config.latent) is not None:
            q = self._latent_queries(f"{layer}self_attn.", y, positions, latent)
            keys, values = self._from_latents(f"{layer}self_attn.", keys, values, latent)
        else:
            q = self.linear(f"{layer}self_attn.q_proj", y)
            if self.config.gated:
                q, gate = np.split(q.reshape(len(y), -1, 2 * self.config.head_dim), 2, -1)
            q = self.heads(f"{layer}self_attn.q", q, positions)
        out = attention(q, keys, values, mask, self.config.attention_scale)
        if gate is not None:
            out = out * sigmoid(gate.reshape(out.shape))
        out = self.linear(f"{layer}self_attn.o_proj", out)
        return self.finish(layer, out, x)

    def keys_and_values(self, layer: str, x: Array, positions: Ints) -> tuple[Array, Array]:
        """Return the (kv_heads, n, head_dim) each, of n rows.

        With latent attention these are (1, n, rank) latents and (1, n, head_dim) rotary keys.
        """
        if (latent := self.config.latent) is None:
            return super().keys_and_values(layer, x, positions)
        both = self.linear(f"{layer}self_attn.kv_a_proj_with_mqa", x)
        latents, keys = np.split(both, [latent.rank], -1)
        latents = self.normed(f"{layer}self_attn.kv_a_layernorm", latents)
        return latents[None], self._rotated(keys[None], positions, latent)

    def _latent_queries(self, name: str, y: Array, positions: Ints, latent: Latent) -> Array:
        """Return the (heads, n, key_dim + head_dim) queries of n rows."""
        if latent.query_rank:
            y = self.normed(name + "q_a_layernorm", self.linear(name + "q_a_proj", y))
        q = self.linear(name + "q_b_proj", y).reshape(len(y), self.config.num_attention_heads, -1)
        plain, rotary = np.split(q.swapaxes(0, 1), [latent.key_dim], -1)
        return np.concatenate([plain, self._rotated(rotary, positions, latent)], -1)

    def _from_latents(
        self, name: str, latents: Array, keys: Array, latent: Latent
    ) -> tuple[Array, Array]:
        """Return the (heads, m, key_dim + head_dim) keys and (heads, m, value_dim) values."""
        heads = self.config.num_attention_heads
        both = (latents[0] @ self.tensors[name + "kv_b"].T).reshape(latents.shape[1], heads, -1)
        plain, values = np.split(both.swapaxes(0, 1), [latent.key_dim], -1)
        return np.concatenate([plain, keys.repeat(heads, 0)], -1), values

    def _rotated(self, x: Array, positions: Ints, latent: Latent) -> Array:
        if latent.interleaved:  # neighbouring channels are pairs
            x = np.concatenate([x[..., ::2], x[..., 1::2]], -1)
        return rotate(x, positions, self.config.inv_freq, self.config.rope_scale)

    def feed_forward(self, network: str, y: Array) -> Array:
        """Sum the outputs of all experts; the ones that are not chosen have a weight of 0."""
        if (experts := self.config.experts) is None:
            return super().feed_forward(network, y)
        weights = self._expert_weights(network + "gate", y, experts)
        gate, up, down = (
            self.tensors[f"{network}experts.{name}_proj"] for name in ("gate", "up", "down")
        )
        inner = silu(np.einsum("nh,eih->nei", y, gate)) * np.einsum("nh,eih->nei", y, up)
        out: Array = np.einsum("ne,nei,ehi->nh", weights, inner, down)
        if experts.shared_width:
            shared = super().feed_forward(network + "shared_expert.", y)
            if experts.shared_gate:
                shared = shared * sigmoid(self.linear(network + "shared_expert_gate", y))
            out = out + shared
        return out

    def _expert_weights(self, gate: str, y: Array, experts: MtpExperts) -> Array:
        """Return (n, count) weights (DeepSeek-V3, arXiv 2412.19437, equations 13 to 16)."""
        scores = self.linear(gate, y)
        scores = sigmoid(scores) if experts.sigmoid else softmax(scores)
        ranks = scores + self.tensors.get(gate + ".correction.bias", np.float32(0))
        groups = ranks.reshape(len(y), experts.groups, -1)
        best = np.argsort(-np.sort(groups, -1)[..., -2:].sum(-1))[:, : experts.chosen_groups]
        for row, chosen in zip(groups, best, strict=True):
            row[np.setdiff1d(np.arange(experts.groups), chosen)] = -np.inf
        chosen = np.argsort(-groups.reshape(len(y), -1))[:, : experts.per_token]
        weights = np.zeros_like(scores)
        np.put_along_axis(weights, chosen, np.take_along_axis(scores, chosen, -1), -1)
        if experts.normalised:
            weights = weights / weights.sum(-1, keepdims=True)
        return np.asarray(weights * np.float32(experts.scale))

    def feedback(self, x: Array) -> Array:
        """Compute the states of the children of rows, from the rows' outputs."""
        return self.normed("norm", x) if self.config.normed_feedback else x


@dataclass(frozen=True, eq=False)
class MtpBlock:
    """The n rows of one depth, and the m rows of the sequence so far; a draft has the root's row.

    The keys and values are (kv_heads, m, head_dim), at (m,) `positions`; (n, m) `related` says
    whether a row of this depth descends from a row, or is it. `depths` are wanted.
    """

    output: Array  # (n, hidden_size) of the layer
    keys: Array
    values: Array
    positions: Ints
    related: NDArray[np.bool_]
    depths: int


class ParallelDrafter(Drafter):
    """P-EAGLE: rows with the mask token follow the root's, and all rows are one causal text."""

    def __init__(self, model: MtpModel) -> None:
        super().__init__(model, None)

    def draft_one(self, state: State, root: int, depths: int | None) -> Block:
        cache, model = state.drafter, self.model
        assert isinstance(cache, MtpCache)
        assert isinstance(model, MtpModel)
        first = max(cache.length - 1, 0)
        cache.append(model, state)
        masks, config = model.config.depths - 1, model.config
        tokens = [*state.tokens[first + 1 :], root, *[config.mask_token_id] * masks]
        mask = model.project(model.tensors["mask_hidden"].reshape(1, -1))
        states = np.concatenate([cache.hidden[first:], mask.repeat(masks, 0)])
        positions = first + np.arange(len(tokens), dtype=np.int32)
        y, x = model.read(np.array(tokens, np.int32), states)
        for n in range(config.num_hidden_layers):
            layer = f"further_layers.{n - 1}." if n else "layer."
            y = model.normed(layer + "input_layernorm", x) if n else y
            keys, values = cache.attend(n, *model.keys_and_values(layer, y, positions))
            rows = np.arange(keys.shape[1], dtype=np.int32)
            seen = visible(positions, rows, None, causal=True)
            x = model.layer((y, x), positions, keys, values, seen, layer)
        cache.commit(np.arange(cache.length - 1 - first, dtype=np.int32))
        hidden = x[-config.depths :]
        return Block(root, hidden[:depths])


class MtpDrafter(OneByOneDrafter):
    """`treeflash.decoding.interfaces.Drafter` in NumPy: the rows of committed positions."""

    def __init__(self, model: MtpModel) -> None:
        self.model = model

    def draft_one(self, state: State, root: int, depths: int | None) -> MtpBlock:
        cache, model = state.drafter, self.model
        assert isinstance(cache, MtpCache)
        first = max(cache.length - 1, 0)
        cache.append(model, state)
        tokens = np.array([*state.tokens[first + 1 :], root], np.int32)
        positions = np.arange(first, cache.length, dtype=np.int32)
        y, residual = model.read(tokens, cache.hidden[first:])
        keys, values = cache.attend(0, *model.keys_and_values("layer.", y, positions))
        cache.commit(np.arange(len(tokens) - 1, dtype=np.int32))
        rows = np.arange(keys.shape[1], dtype=np.int32)
        mask = visible(positions[-1:], rows, model.config.sliding_windows[0], causal=True)
        output = model.layer((y[-1:], residual[-1:]), positions[-1:], keys, values, mask)
        most = model.config.depths
        related = np.ones(mask.shape, np.bool_)
        return MtpBlock(output, keys, values, rows, related, min(depths or most, most))

    def marginals_one(self, block: MtpBlock, options: TableOptions) -> TransitionTable:
        raise ConfigError(NO_MARGINALS)

    def log_probs(self, block: MtpBlock) -> Array:
        raise ConfigError(NO_MARGINALS)


class MtpHead(OneByOneHead):
    """`treeflash.decoding.interfaces.ARHead` in NumPy, one pass of the layer for each depth."""

    def __init__(self, model: MtpModel) -> None:
        self.model = model

    def transitions_one(self, block: MtpBlock, options: TableOptions) -> TransitionTable:
        model, temperature = self.model, np.float32(options.temperature)
        noise = np.zeros((block.depths, 1), np.float32)
        if options.noise is not None:
            noise = options.noise.values(model.token_ids)
        width = min(options.m, MAX_PATHS if options.rows is None else options.rows, MAX_PATHS)
        rows, paths = block, np.zeros(1)
        tokens: list[Ints] = []
        log_probs: list[Array] = []
        kept: list[NDArray[np.int64]] = []
        parents = np.zeros(1, np.int64)
        for depth in range(block.depths):
            if depth:
                rows = self._step(block, rows, depth, tokens[-1].ravel()[kept[-1]], parents)
            scores = (model.logits(rows.output) + noise[depth]) / temperature
            best, best_log_probs = top(scores, options.k)
            tokens.append(model.token_ids[best])
            log_probs.append(best_log_probs)
            chosen, paths = best_children(paths, best_log_probs, width)
            kept.append(chosen)
            parents = chosen // best.shape[1]
        return TransitionTable.from_paths(tokens, log_probs, kept)

    def log_probs(self, block: MtpBlock, previous: Ints) -> Array:
        rows, outputs = block, [block.output]
        for depth in range(1, len(previous)):
            rows = self._step(block, rows, depth, previous[depth : depth + 1], np.zeros(1, int))
            outputs.append(rows.output)
        log_probs = log_softmax(self.model.logits(np.concatenate(outputs)))
        return self.model.over_target_vocabulary(log_probs)

    def _step(
        self, block: MtpBlock, rows: MtpBlock, depth: int, tokens: Ints, parents: NDArray[np.int64]
    ) -> MtpBlock:
        """Append the rows of (n,) tokens that follow (n,) rows of the depth before."""
        model, n = self.model, len(tokens)
        positions = np.full(n, block.keys.shape[1] - 1 + depth, np.int32)
        y, residual = model.read(tokens, model.feedback(rows.output[parents]))
        new_keys, new_values = model.keys_and_values("layer.", y, positions)
        keys = np.concatenate([rows.keys, new_keys], 1)
        values = np.concatenate([rows.values, new_values], 1)
        related = np.concatenate([rows.related[parents], np.eye(n, dtype=np.bool_)], 1)
        all_positions = np.concatenate([rows.positions, positions])
        near = visible(positions, all_positions, model.config.sliding_windows[0], causal=True)
        output = model.layer((y, residual), positions, keys, values, related & near)
        return MtpBlock(output, keys, values, all_positions, related, block.depths)
