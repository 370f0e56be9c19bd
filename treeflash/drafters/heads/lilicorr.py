"""The head of LiLiCorr (arXiv 2608.20530): a transformer over the candidates of all slots."""

from __future__ import annotations

from treeflash.drafters.config import CorrelationShape, DrafterConfig
from treeflash.drafters.heads.head_format import HeadFormat
from treeflash.drafters.heads.operations import Array, Head, Operations

CORRELATION_KEYS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "mlp_ratio",
    "logit_scale",
    "vector_eps",
)
"""The settings of LiLiCorr's transformer, without their prefix; they have no defaults."""


class BiasedAttention:
    """Attention with a bias on its scores, with the tensors of PyTorch's `MultiheadAttention`."""

    ops: Operations

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = self.ops.parameter(3 * width, width)
        self.in_proj_bias = self.ops.parameter(3 * width)
        self.out_proj = self.ops.linear(width, width)

    def forward(self, x: Array, bias: Array) -> Array:
        """Return the (blocks, n, width) from (blocks, n, width) and a (heads, n, n) bias."""
        qkv = x @ self.in_proj_weight.T + self.in_proj_bias
        parts = qkv.reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = (parts[:, :, i].swapaxes(1, 2) for i in range(3))
        y = self.ops.attention(q, k, v, bias)
        return self.out_proj(y.swapaxes(1, 2).reshape(x.shape))


class CorrelationLayer:
    """A layer of LiLiCorr's transformer, whose attention has a bias by slots."""

    ops: Operations

    def __init__(self, shape: CorrelationShape, eps: float) -> None:
        super().__init__()
        ops, w, inner = self.ops, shape.hidden_size, shape.inner_size
        self.attn_norm, self.mlp_norm = ops.rms_norm(w, eps), ops.rms_norm(w, eps)
        self.attn = ops.module(BiasedAttention)(w, shape.heads)
        self.mlp = ops.children([ops.linear(w, inner), ops.activation(), ops.linear(inner, w)])

    def forward(self, x: Array, bias: Array) -> Array:
        """Return the (blocks, n, w) nodes from (blocks, n, w) nodes and a (heads, n, n) bias."""
        x = x + self.attn(self.attn_norm(x), bias)
        y = self.mlp_norm(x)
        for part in self.mlp:
            y = part(y)
        return x + y


class Correlation(Head):
    """LiLiCorr: products of vectors that a transformer over all candidates of a block computes."""

    kind = "correlation"

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        assert config.correlation is not None
        self.shape = shape = config.correlation
        ops, slots = self.ops, config.depths
        h, w, r = config.hidden_size, shape.hidden_size, config.head_rank
        self.token_proj = ops.linear(h, w) if w != h else None
        self.pass_hidden_proj, self.context_proj = ops.linear(h, w), ops.linear(h, w)
        self.feature_mlp = ops.children(
            [ops.layer_norm(5), ops.linear(5, w), ops.activation(), ops.linear(w, w)]
        )
        self.factor_input_proj = ops.linear(3 * w, w)
        self.out_head, self.in_head = ops.linear(w, r), ops.linear(w, r)
        self.anchor_out_head = ops.linear(w, r)
        eps = config.rms_norm_eps
        self.anchor_norm, self.output_norm = ops.rms_norm(w, eps), ops.rms_norm(w, eps)
        self.rank_embedding = ops.parameter(1, 1, 1, config.selector_top_k, w)
        self.slot_embedding = ops.parameter(1, 1, slots, 1, w)
        self.relative_slot_bias = ops.parameter(shape.heads, 2 * slots + 1)
        self.same_slot_bias = ops.parameter(shape.heads)
        layer = ops.module(CorrelationLayer)
        self.layers = ops.children([layer(shape, eps) for _ in range(shape.layers)])

    def forward(self, embedded: Array, normed: Array, log_probs: Array, anchor: Array) -> Array:
        """Return the (B, D, k, k) scores of candidates after the candidates of the slot before.

        They come from the (B, D, k, hidden_size) embeddings of the candidates of B blocks, best
        first, (B, D, hidden_size) u, the (B, D, k) log probabilities, and the (B, hidden_size)
        contexts of the last positions.
        """
        ops, (blocks, slots, k) = self.ops, log_probs.shape
        ranks = ops.broadcast_to(ops.float32(ops.arange(k, log_probs)), log_probs.shape)
        parts = [log_probs, ops.exp(log_probs), log_probs - log_probs[:, :, :1]]
        y = ops.stack([*parts, ranks / max(k - 1, 1), ops.float32(ranks == 0)], -1)
        y = ops.cast(y, embedded)
        for part in self.feature_mlp:
            y = part(y)
        x = embedded if self.token_proj is None else self.token_proj(embedded)
        x = x + self.pass_hidden_proj(normed)[:, :, None] + y
        x = x + self.slot_embedding[0, 0] + self.rank_embedding[0, 0]
        x = x.reshape(blocks, slots * k, -1)
        slot = ops.arange(slots * k, log_probs) // k
        distance = slot[:, None] - slot
        bias = self.relative_slot_bias[:, distance + slots]
        bias = bias + self.same_slot_bias[:, None, None] * (distance == 0)
        for layer in self.layers:
            x = layer(x, bias)
        known = self.anchor_norm(self.context_proj(anchor))[:, None]
        x = self.output_norm(x)
        joint = ops.concatenate([x, ops.broadcast_to(known, x.shape), x * known], -1)
        factors = ops.silu(self.factor_input_proj(joint)).reshape(blocks, slots, k, -1)
        after = self._unit(self.in_head(factors))
        start = self._unit(self.anchor_out_head(known))[:, None]
        start = ops.broadcast_to(start, (blocks, 1, *after.shape[2:]))
        before = ops.concatenate([start, self._unit(self.out_head(factors))[:, :-1]], 1)
        return self.shape.logit_scale * before @ after.swapaxes(-1, -2)

    def _unit(self, x: Array) -> Array:
        return self.ops.unit(x, self.shape.vector_eps)


HEADS = {
    "lilicorr": HeadFormat(
        family="LiLiCorr",
        module=Correlation,
        prefix="lilicorr.",
        settings={
            "lilicorr_factor_dim": "head_rank",
            "lilicorr_candidate_topk": "selector_top_k",
            **{f"lilicorr_{name}": "correlation" for name in CORRELATION_KEYS},
        },
    )
}
