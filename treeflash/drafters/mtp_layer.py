"""The layer of heads that draft depth by depth, written once for PyTorch and MLX.

See `treeflash.drafters.mtp_heads` for what a row is, and `treeflash.drafters.heads.operations` for
how a framework's module is made of a class. Names of attributes are the canonical names of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.drafters.heads.operations import Array, Module, Operations
from treeflash.drafters.layers import Attention, Gemma4Layer, Layer, Rotation
from treeflash.drafters.mtp_heads import MtpConfig, MtpExperts


class Router:
    """Chooses the experts of each row, and their weights."""

    ops: Operations

    def __init__(self, config: MtpExperts, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = self.ops.parameter(config.count, hidden_size)
        if config.sigmoid:
            self.correction = self.ops.float32_bias(config.count)

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Return (n, per_token) float32 weights and indices of experts, from (n, hidden_size)."""
        ops = self.ops
        logits = ops.float32(x) @ ops.float32(self.weight).T
        if self.config.sigmoid:
            scores = ops.sigmoid(logits)
            ranks = self.correction(scores)
        else:
            scores = ranks = ops.softmax(logits)
        if self.config.groups > 1:
            ranks = self._in_best_groups(ranks)
        experts = ops.top(ranks, self.config.per_token)
        weights = ops.gather(scores, experts)
        if self.config.normalised:
            weights = weights / weights.sum(-1, keepdims=True)
        return weights * self.config.scale, experts

    def _in_best_groups(self, ranks: Array) -> Array:
        """Lower (n, count) ranks outside of the groups whose best two experts are best."""
        ops, groups = self.ops, self.config.groups
        members = ranks.reshape(len(ranks) * groups, -1)
        best = ops.gather(members, ops.top(members, 2)).sum(-1).reshape(-1, groups)
        chosen = ops.top(best, self.config.chosen_groups)[:, :, None]
        kept = ops.float32((chosen == ops.arange(groups, ranks)).any(1))
        # A rank can be negative, as its bias can.
        lower = members.reshape(len(ranks), groups, -1) - 1e30 * (1 - kept)[:, :, None]
        return lower.reshape(len(ranks), -1)


class MixtureOfExperts:
    """Routed experts, and one that runs for every row."""

    ops: Operations

    def __init__(self, config: MtpConfig) -> None:
        super().__init__()
        ops, experts, h = self.ops, config.experts, config.hidden_size
        assert experts is not None
        self.gate = ops.module(Router)(experts, h)
        self.experts = ops.experts(h, experts.width, experts.count)
        self.shared_expert = self.shared_expert_gate = None
        if experts.shared_width:
            self.shared_expert = ops.mlp(replace(config, intermediate_size=experts.shared_width))
        if experts.shared_gate:
            self.shared_expert_gate = ops.linear(h, 1, bias=False)

    def forward(self, x: Array) -> Array:
        """Map (n, hidden_size) to (n, hidden_size)."""
        weights, chosen = self.gate(x)
        out = self.ops.cast(self.experts(x, chosen, weights), x)
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.shared_expert_gate is not None:
                shared = shared * self.ops.sigmoid(self.shared_expert_gate(x))
            out = out + shared
        return out


class RowAttention(Attention):
    """Attention whose `q_proj` gives the queries of a head, then its gates if there are any."""

    def __init__(self, config: MtpConfig) -> None:
        ops, q = self.ops, config.num_attention_heads * config.head_dim
        super().__init__(
            config,
            ops.float32_norm if config.qk_norm else None,
            inputs=2 * config.hidden_size if config.reads_both else config.hidden_size,
            queries=2 * q if config.gated else q,
            output_bias=config.output_bias,
        )

    def _queries_and_gates(self, y: Array) -> tuple[Array, Array | None]:
        q = self.q_proj(y).reshape(len(y), self.config.num_attention_heads, -1)
        return self.ops.split(q, 2) if self.config.gated else (q, None)


class LatentAttention:
    """Latent attention, in which queries meet the latents themselves.

    With a latent c, a head's key is W_k c beside a rotary key that all heads share, and its value
    is W_v c. Since q W_k c = (q W_k) c, and sums of W_v c are W_v applied to sums of c, all heads
    attend to the same rows: the latent and the rotary key, side by side.
    """

    ops: Operations

    def __init__(self, config: MtpConfig) -> None:
        super().__init__()
        self.config, ops, latent = config, self.ops, config.latent
        assert latent is not None
        self.latent = latent
        h, heads, eps = config.hidden_size, config.num_attention_heads, config.rms_norm_eps
        query, rank = heads * (latent.key_dim + config.head_dim), latent.query_rank
        if rank:
            self.q_a_proj = ops.linear(h, rank, bias=False)
            self.q_a_layernorm = ops.float32_norm(rank, eps)
        self.q_b_proj = ops.linear(rank or h, query, bias=False)
        self.kv_a_proj_with_mqa = ops.linear(h, latent.rank + config.head_dim, bias=False)
        self.kv_a_layernorm = ops.float32_norm(latent.rank, eps)
        self.kv_b = ops.parameter(heads * (latent.key_dim + latent.value_dim), latent.rank)
        self.o_proj = ops.linear(heads * latent.value_dim, h, bias=False)
        self.rotate = ops.rotary(config)

    def queries(self, y: Array, rotation: Rotation) -> tuple[Array, None]:
        """Return (1, heads, n, rank + head_dim) queries."""
        latent, heads = self.latent, self.config.num_attention_heads
        inner = self.q_a_layernorm(self.q_a_proj(y)) if latent.query_rank else y
        q = self.q_b_proj(inner).reshape(len(y), heads, -1)
        plain, rotary = q[:, :, : latent.key_dim], q[:, :, latent.key_dim :]
        maps = self.kv_b.reshape(heads, -1, latent.rank)[:, : latent.key_dim]
        plain = self.ops.einsum("nhk,hkr->hnr", plain, maps)[None]
        return self.ops.concatenate([plain, self._rotated(rotary, rotation)], -1), None

    def keys_and_values(self, y: Array, rotation: Rotation) -> tuple[Array, Array]:
        """Return the (1, 1, n, rank) latents and the (1, 1, n, head_dim) rotary keys of n rows."""
        both, rank = self.kv_a_proj_with_mqa(y), self.latent.rank
        latents = self.kv_a_layernorm(both[:, :rank])[None, None]
        return latents, self._rotated(both[:, None, rank:], rotation)

    def output(self, attended: Array, gate: None) -> Array:
        """Return (n, hidden_size) from (n, heads, rank + head_dim) sums of latents and keys."""
        latent, heads = self.latent, self.config.num_attention_heads
        maps = self.kv_b.reshape(heads, -1, latent.rank)[:, latent.key_dim :]
        values = self.ops.einsum("nhr,hvr->nhv", attended[:, :, : latent.rank], maps)
        return self.o_proj(values.reshape(len(values), -1))

    def _rotated(self, x: Array, rotation: Rotation) -> Array:
        n, heads, width = x.shape
        if self.latent.interleaved:  # neighbouring channels are pairs
            x = x.reshape(n, heads, width // 2, 2).swapaxes(2, 3).reshape(n, heads, width)
        return self.rotate(x, rotation)


class MtpLayer:
    """The weights of an MTP head, under their canonical names, and what rows compute with them.

    A backend adds what depends on its KV caches: `rotation`, `write` and `attend`.
    """

    ops: Operations

    def __init__(self, config: MtpConfig) -> None:
        super().__init__()
        self.config, ops = config, self.ops
        h, eps, features = config.hidden_size, config.rms_norm_eps, len(config.target_layer_ids)
        self.embedding_norm = ops.float32_norm(h, eps)
        self.hidden_norm = ops.float32_norm(h, eps)
        self.input_proj = self.fc = self.input_norm = self.fc_norm = None
        if config.reads_both:
            self.fc = ops.linear(features * h, h, bias=False)
            if config.feature_norms == "all":
                self.input_norm = ops.float32_norm(features * h, eps)
            if config.feature_norms == "each":
                self.fc_norm = ops.children([ops.float32_norm(h, eps) for _ in range(features)])
        else:
            self.input_proj = ops.linear(2 * h, h, bias=False)
        self.layer = self._layer(config)
        ordinary = replace(config, reads_both=False)
        self.further_layers = ops.children(
            [self._layer(ordinary) for _ in range(config.num_hidden_layers - 1)]
        )
        if config.has_marginals:
            self.mask_hidden = ops.parameter(1, 1, features * h)
        self.norm = ops.float32_norm(h, eps)

    def _layer(self, config: MtpConfig) -> Module:
        ops = self.ops
        attention = ops.module(LatentAttention if config.latent else RowAttention)(config)
        network = ops.module(MixtureOfExperts)(config) if config.experts else ops.mlp(config)
        return ops.module(Gemma4Layer if config.gemma4 else Layer)(
            *(config, attention, network),
            norm=ops.float32_norm,
            norms_input=not config.reads_both,
        )

    def project(self, features: Array) -> Array:
        """Project (n, features * hidden_size) target outputs to (n, hidden_size) states."""
        if self.fc is None:
            return features
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = self.ops.split(features, len(self.fc_norm))
            normed = [norm(x) for norm, x in zip(self.fc_norm, parts, strict=True)]
            features = self.ops.concatenate(normed, -1)
        return self.fc(features)

    def read(self, embedded: Array, states: Array) -> tuple[Array, Array]:
        """Return attention's input and residual from (n, hidden_size) embeddings and states."""
        normed = self.hidden_norm(states)
        if self.config.input_scale != 1:
            embedded = embedded * self.config.input_scale
        both = self.ops.concatenate([self.embedding_norm(embedded), normed], -1)
        if self.input_proj is None:
            return both, normed if self.config.normed_residual else states
        x = self.input_proj(both)
        return self.layer.input_layernorm(x), x

    def run(
        self,
        embedded: Array,
        states: Array,
        rotation: Rotation,
        attend: Callable[[int, Array, Array, Array], Array],
    ) -> Array:
        """Return (n, hidden_size) outputs of rows after all layers of P-EAGLE.

        `attend` is an `Attend` that is also given a layer's number.
        """
        y, x = self.read(embedded, states)
        for n, layer in enumerate([self.layer, *self.further_layers]):
            if n:
                y = layer.input_layernorm(x)
            q, gate = layer.self_attn.queries(y, rotation)
            keys_and_values = layer.self_attn.keys_and_values(y, rotation)
            x = layer.finish(attend(n, q, *keys_and_values), gate, x)
        return x

    def feedback(self, outputs: Array) -> Array:
        """Return the states of the children of rows."""
        return self.norm(outputs) if self.config.normed_feedback else outputs

    def rotation(self, positions: NDArray[np.integer], like: Array) -> Rotation:
        """Return the rotation of rows at rotary positions, in the dtype of `like`, on its device.

        The positions are (n,), or (3, n) of time, height and width.
        """
        raise NotImplementedError

    def write(self, segments: Sequence[tuple[Any, int, int]], k: Array, v: Array) -> None:
        """Write the rows of several sequences: each cache, its first column and number of rows."""
        raise NotImplementedError

    def attend(
        self,
        queries: Array,
        caches: Sequence[Any],
        committed: Sequence[int],
        depth: int,
        visible: Array | None,
    ) -> Array:
        """Attend from each sequence's rows to its columns: (sequences * n, heads, head_dim).

        The (1, heads, sequences * n, head_dim) queries are of rows of a depth. They see the columns
        of committed rows and of the root as far as the window reaches, and of the c columns behind
        them what (sequences, n, c) `visible` tells; None if there are none.
        """
        raise NotImplementedError
