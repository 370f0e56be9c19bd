"""The conditional heads: their weights, how they score tokens, and the tables they give.

A head of `HEADS` is a module with the tensors of its format. A `ConditionalHead` is first-order:
its scores depend on the slot and on one previous token, and `ARHead` scores all slots of all
sequences together. A `RecurrentCell` has a state for the path of previous tokens, and
`RecurrentHead` follows the paths depth by depth. All scores are logits before the temperature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from treeflash.decoding.backend_base import CandidateHead
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.config import Correlation as CorrelationShape
from treeflash.drafters.config import DrafterConfig
from treeflash_mlx.drafter import Block, OutputStage
from treeflash_mlx.drafter_model import DrafterModel
from treeflash_mlx.numerics import log_softmax, logsumexp, top_indices, top_log_probs
from treeflash_mlx.target import Target


class PairLinear(nn.Module):
    """A linear layer of two concatenated vectors of equal size; many rows share the second one."""

    def __init__(self, size: int, out: int, bias: bool) -> None:
        super().__init__()
        # A product with a concatenation is the sum of two products.
        self.first = nn.Linear(size, out, bias=False)
        self.second = nn.Linear(size, out, bias=bias)

    def __call__(self, first: mx.array, second: mx.array, rows: mx.array) -> mx.array:
        """(n, out) from (n, size) first vectors and the (n,) rows of (d, size) second vectors."""
        return self.first(first) + self.second(second)[rows]


def split_pairs(module: nn.Module, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A checkpoint's tensors by name, with the weights of the `PairLinear`s in a module split.

    A pair has an (out, 2 * size) weight in the checkpoint, and perhaps an (out,) bias.
    """
    tensors = dict(tensors)
    for name, child in module.named_modules():
        if isinstance(child, PairLinear):
            first, second = mx.split(tensors.pop(f"{name}.weight"), 2, -1)
            # A strided half of a matrix would be copied in every product.
            tensors[f"{name}.first.weight"] = mx.contiguous(first)
            tensors[f"{name}.second.weight"] = mx.contiguous(second)
            if f"{name}.bias" in tensors:
                tensors[f"{name}.second.bias"] = tensors.pop(f"{name}.bias")
    return tensors


NORM_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Slots:
    """The outputs of the drafter at the slots of blocks, which follow one another.

    They are (slots, hidden_size): of the last layer, and normed, u = norm(hidden).
    """

    output: OutputStage
    hidden: mx.array
    normed: mx.array

    @classmethod
    def read(cls, output: OutputStage, hidden: mx.array) -> Slots:
        return cls(output, hidden, output.norm(hidden))


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    output: OutputStage
    logits: mx.array  # (batch, D, v) of the marginals
    rows: mx.array  # (batch, n) the depth of each query, from 0
    # of the drafter's vocabulary: (batch, 1, v), or (batch, D, v) for a head with candidates; None
    # for all
    tokens: mx.array | None


class Head(nn.Module):
    """A head of a drafter, with its tensors under their names in checkpoints."""

    def confidence(self, slots: Slots, previous: mx.array, rows: mx.array) -> mx.array | None:
        """(n,) expected acceptance of a row's tokens, 0 to 1; None if the head does not predict it.

        It follows from (n,) previous tokens of the target's vocabulary, and the slot of each.
        """
        return None


class ConditionalHead(Head):
    """A head whose scores depend on a slot and one previous token.

    It scores the `candidates` most probable tokens of a slot by their marginal; None scores all.
    """

    candidates: int | None = None

    def queries(self, slots: Slots, previous: mx.array, rows: mx.array) -> mx.array:
        """(n, size) vectors that `score` compares with tokens; see `Head.confidence`."""
        raise NotImplementedError

    def score(self, queries: mx.array, scored: ScoredTokens) -> mx.array:
        """(batch, n, v) scores of (batch, n, size) queries.

        They are float32, or have the dtype of the output head.
        """
        raise NotImplementedError


class RecurrentCell(Head):
    """A head with a state for each path of previous tokens, and a bias on the logits of children.

    The bias is the product of a query with the row of r numbers that `token_rows` has for a token.
    """

    token_rows: nn.Embedding

    def start(self, output: OutputStage, block: Block) -> mx.array:
        """The (1, state_size) state before the root."""
        return mx.zeros((1, output.config.head_state_size), block.hidden.dtype)

    def step(
        self, slots: Slots, state: mx.array, previous: mx.array, depth: int
    ) -> tuple[mx.array, mx.array]:
        """(n, state_size) states and (n, r) queries of n paths, advanced by their last token.

        They come from (n, state_size) states, `start` before the root, (n,) tokens of the target's
        vocabulary, and the children's depth, from 0.
        """
        raise NotImplementedError


class Corrected(ConditionalHead):
    """TreeFlash: h' = h + correction([embedding; u]), read by the output head."""

    def correction(self, embedded: mx.array, normed: mx.array, rows: mx.array) -> mx.array:
        """(n, hidden_size) corrections of hidden states.

        They come from (n, hidden_size) embeddings of the previous tokens, and the (n,) `rows` of
        the (D, hidden_size) outputs u that these belong to.
        """
        raise NotImplementedError

    def queries(self, slots: Slots, previous: mx.array, rows: mx.array) -> mx.array:
        correction = self.correction(slots.output.embed(previous), slots.normed, rows)
        return slots.output.norm(slots.hidden[rows] + correction)

    def score(self, queries: mx.array, scored: ScoredTokens) -> mx.array:
        return scored.output.logits(queries, None if scored.tokens is None else scored.tokens[:, 0])


class SwiGLU(Corrected):
    """The correction D(silu(G(x)) * U(x))."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__()
        h = config.hidden_size
        self.norm = nn.RMSNorm(h, NORM_EPS)
        self.ug = PairLinear(h, 2 * inner_size, bias=True)
        self.d = nn.Linear(inner_size, h, bias=False)

    def correction(self, embedded: mx.array, normed: mx.array, rows: mx.array) -> mx.array:
        up, gate = mx.split(self.ug(self.norm(embedded), normed, rows), 2, -1)
        return self.d(nn.silu(gate) * up)


class Linear(Corrected):
    """The paper's ablation D(x), linear in the previous token and the hidden state."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__()
        h = config.hidden_size
        self.norm = nn.RMSNorm(h, NORM_EPS)
        self.d = PairLinear(h, h, bias=False)

    def correction(self, embedded: mx.array, normed: mx.array, rows: mx.array) -> mx.array:
        return self.d(self.norm(embedded), normed, rows)


class Selector(ConditionalHead):
    """DFlash2: U(b) + <A[a] * W u, B[b]> for the candidates b of a slot."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__()
        rank = config.head_rank
        self.predecessor_codebook = mx.zeros((vocab_size, rank))
        self.successor_codebook = mx.zeros((vocab_size, rank))
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)
        self.candidates = config.selector_top_k

    def queries(self, slots: Slots, previous: mx.array, rows: mx.array) -> mx.array:
        projected = self.hidden_projection(slots.normed)
        return self.predecessor_codebook[previous] * projected[rows]

    def score(self, queries: mx.array, scored: ScoredTokens) -> mx.array:
        assert scored.tokens is not None
        keys = self.successor_codebook[take_rows(scored.tokens, scored.rows)].astype(mx.float32)
        terms = (keys @ queries.astype(mx.float32)[..., None])[..., 0]
        return terms + take_rows(scored.logits, scored.rows)


class MarkovTensors(Head):
    """The tensors that DSpark's heads share, and their confidence head."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__()
        h, rank = config.hidden_size, config.head_rank
        self.config = config
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Embedding(config.draft_vocab_size or vocab_size, rank)
        if config.confidence_head:
            width = h + rank if config.confidence_with_markov else h
            self.confidence_head = {"proj": nn.Linear(width, 1)}

    def confidence(self, slots: Slots, previous: mx.array, rows: mx.array) -> mx.array | None:
        if not self.config.confidence_head:
            return None
        x = slots.normed[rows]
        if self.config.confidence_with_markov:
            x = mx.concatenate([x, self.markov_w1(previous)], -1)
        logits = self.confidence_head["proj"](x)
        return mx.sigmoid(logits[:, 0].astype(mx.float32))


class Markov(MarkovTensors, ConditionalHead):
    """DSpark: z(b) + <W2[b], e>, where e = W1[a], or a gated form of it."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        if config.head == "gated":
            self.gate_proj = nn.Linear(config.hidden_size + config.head_rank, config.head_rank)

    def queries(self, slots: Slots, previous: mx.array, rows: mx.array) -> mx.array:
        embedded = self.markov_w1(previous)
        if self.config.head == "gated":
            gate = self.gate_proj(mx.concatenate([slots.normed[rows], embedded], -1))
            embedded = embedded * mx.sigmoid(gate)
        return embedded

    def score(self, queries: mx.array, scored: ScoredTokens) -> mx.array:
        if scored.tokens is None:
            terms = self.markov_w2.as_linear(queries)
        else:
            terms = queries @ self.markov_w2(scored.tokens[:, 0]).swapaxes(-1, -2)
        return terms.astype(mx.float32) + take_rows(scored.logits, scored.rows)


class MarkovRNN(MarkovTensors, RecurrentCell):
    """DSpark: z(b) + <W2[b], tanh(o)>, a gated recurrent unit over W1[a] and the hidden state."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        rank = config.head_rank
        self.joint_proj = nn.Linear(2 * rank + config.hidden_size, 3 * rank)

    @property
    def token_rows(self) -> nn.Embedding:
        return self.markov_w2

    def step(
        self, slots: Slots, state: mx.array, previous: mx.array, depth: int
    ) -> tuple[mx.array, mx.array]:
        embedded = self.markov_w1(previous)
        normed = mx.broadcast_to(slots.normed[depth], (len(embedded), slots.normed.shape[1]))
        x = self.joint_proj(mx.concatenate([state, embedded, normed], -1))
        gate, candidate, out = mx.split(x, 3, -1)
        gate = mx.sigmoid(gate)
        return gate * state + (1 - gate) * mx.tanh(candidate), mx.tanh(out)


class GRU(nn.Module):
    """A GRU without biases, with PyTorch's names for its tensors."""

    def __init__(self, size: int, state_size: int) -> None:
        super().__init__()
        self.weight_ih_l0 = mx.zeros((3 * state_size, size))
        self.weight_hh_l0 = mx.zeros((3 * state_size, state_size))

    def __call__(self, x: mx.array, state: mx.array) -> mx.array:
        """(n, state_size) states from (n, size) inputs and (n, state_size) states."""
        inputs = mx.split(x @ self.weight_ih_l0.T, 3, -1)
        states = mx.split(state @ self.weight_hh_l0.T, 3, -1)
        reset, update = (mx.sigmoid(inputs[i] + states[i]) for i in (0, 1))
        new = mx.tanh(inputs[2] + reset * states[2])
        return (1 - update) * new + update * state


class Domino(RecurrentCell):
    """Domino: z(b) + <W2[b], silu(W1 [u; s])>, where s is a GRU over the tokens' embeddings.

    Before the first depth of the head the bias is 0.
    """

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__()
        h, rank, g = config.hidden_size, config.head_rank, config.head_state_size
        self.config = config
        self.prefix_gru = GRU(h, g)
        # The last one is no linear layer here: its rows are also taken for single tokens.
        self.embed_proj = [
            nn.Linear(h + g, rank, bias=False),
            nn.SiLU(),
            nn.Embedding(vocab_size, rank),
        ]

    @property
    def token_rows(self) -> nn.Embedding:
        return self.embed_proj[2]

    def step(
        self, slots: Slots, state: mx.array, previous: mx.array, depth: int
    ) -> tuple[mx.array, mx.array]:
        state = self.prefix_gru(slots.output.embed(previous), state)
        if depth + 1 < self.config.head_from_depth:
            return state, mx.zeros((len(state), self.config.head_rank), state.dtype)
        normed = mx.broadcast_to(slots.normed[depth], (len(state), slots.normed.shape[1]))
        return state, nn.silu(self.embed_proj[0](mx.concatenate([normed, state], -1)))


class XPress(RecurrentCell):
    """X-PRESS: z(b) + <readout[b], x>, where x mixes the inputs of all slots of a path so far.

    The state has the projection of the block's mean, and then the input of each slot. The first
    slot's input comes from the token before the root.
    """

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__()
        h, r, slots = config.hidden_size, config.head_rank, config.block_size
        inner = config.head_mlp_ratio * r
        self.token_embed = nn.Embedding(vocab_size, r)
        self.down_h, self.down_g = nn.Linear(h, r, bias=False), nn.Linear(h, r, bias=False)
        self.in_proj = nn.Linear(3 * r, r, bias=False)
        self.mix_l = mx.zeros((r, slots, slots))
        self.mlp_gate, self.mlp_up = (
            nn.Linear(r, inner, bias=False),
            nn.Linear(r, inner, bias=False),
        )
        self.mlp_down = nn.Linear(inner, r, bias=False)
        # No linear layer here: its rows are also taken for single tokens.
        self.readout = nn.Embedding(config.draft_vocab_size or vocab_size, r)

    @property
    def token_rows(self) -> nn.Embedding:
        return self.readout

    def start(self, output: OutputStage, block: Block) -> mx.array:
        normed = output.norm(block.slots)
        inputs = super().start(output, block).reshape(1, -1, len(self.mix_l))
        inputs[:, 0] = self.down_g(normed.mean(0, keepdims=True))
        inputs[:, 1] = self._input(inputs, normed[0], mx.array([block.before]))
        return inputs.reshape(1, -1)

    def step(
        self, slots: Slots, state: mx.array, previous: mx.array, depth: int
    ) -> tuple[mx.array, mx.array]:
        inputs, slot = state.reshape(len(state), -1, len(self.mix_l)), depth + 1
        new = self._input(inputs, slots.normed[depth], previous)
        inputs[:, 1 + slot] = new
        mix = self.mix_l[:, slot, : slot + 1].T
        x = new + (inputs[:, 1 : slot + 2] * mix).sum(1)
        x = x + self.mlp_down(nn.silu(self.mlp_gate(x)) * self.mlp_up(x))
        return inputs.reshape(len(state), -1), x

    def _input(self, inputs: mx.array, normed: mx.array, previous: mx.array) -> mx.array:
        """(n, r) inputs of a slot after (n,) previous tokens."""
        embedded = self.token_embed(previous)
        hidden = mx.broadcast_to(self.down_h(normed[None]), embedded.shape)
        return self.in_proj(mx.concatenate([hidden, inputs[:, 0], embedded], -1))


class BiasedAttention(nn.Module):
    """Attention with a bias on its scores, with the tensors of PyTorch's `MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = mx.zeros((3 * width, width))
        self.in_proj_bias = mx.zeros((3 * width,))
        self.out_proj = nn.Linear(width, width)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        """(n, width) from (n, width) and a (heads, n, n) bias."""
        qkv = x @ self.in_proj_weight.T + self.in_proj_bias
        q, k, v = qkv.reshape(len(x), 3, self.heads, -1).transpose(1, 2, 0, 3)
        scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5 + bias
        y = mx.softmax(scores, -1, precise=True) @ v
        return self.out_proj(y.swapaxes(0, 1).reshape(x.shape))


class CorrelationLayer(nn.Module):
    """A layer of LiLiCorr's transformer, whose attention has a bias by slots."""

    def __init__(self, shape: CorrelationShape, eps: float) -> None:
        super().__init__()
        w, inner = shape.hidden_size, shape.inner_size
        self.attn_norm, self.mlp_norm = nn.RMSNorm(w, eps), nn.RMSNorm(w, eps)
        self.attn = BiasedAttention(w, shape.heads)
        self.mlp = [nn.Linear(w, inner), nn.SiLU(), nn.Linear(inner, w)]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        """(n, w) nodes from (n, w) nodes and a (heads, n, n) bias."""
        x = x + self.attn(self.attn_norm(x), bias)
        y = self.mlp_norm(x)
        for part in self.mlp:
            y = part(y)
        return x + y


class Correlation(Head):
    """LiLiCorr: products of vectors that a transformer over all candidates of a block computes."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__()
        assert config.correlation is not None
        self.shape = shape = config.correlation
        h, w, r, slots = config.hidden_size, shape.hidden_size, config.head_rank, config.depths
        if w != h:
            self.token_proj = nn.Linear(h, w)
        self.pass_hidden_proj, self.context_proj = nn.Linear(h, w), nn.Linear(h, w)
        self.feature_mlp = [nn.LayerNorm(5), nn.Linear(5, w), nn.SiLU(), nn.Linear(w, w)]
        self.factor_input_proj = nn.Linear(3 * w, w)
        self.out_head, self.in_head, self.anchor_out_head = (nn.Linear(w, r) for _ in range(3))
        eps = config.rms_norm_eps
        self.anchor_norm, self.output_norm = nn.RMSNorm(w, eps), nn.RMSNorm(w, eps)
        self.rank_embedding = mx.zeros((1, 1, 1, config.selector_top_k, w))
        self.slot_embedding = mx.zeros((1, 1, slots, 1, w))
        self.relative_slot_bias = mx.zeros((shape.heads, 2 * slots + 1))
        self.same_slot_bias = mx.zeros((shape.heads,))
        self.layers = [CorrelationLayer(shape, eps) for _ in range(shape.layers)]

    def __call__(
        self, embedded: mx.array, normed: mx.array, log_probs: mx.array, anchor: mx.array
    ) -> mx.array:
        """(S - 1, k, k) scores of candidates after the candidates of the slot before.

        From (S - 1, k, hidden_size) embeddings of candidates, best first, (S - 1, hidden_size) u,
        the (S - 1, k) log probabilities, and the (hidden_size,) context of the last position.
        """
        slots, k = log_probs.shape
        ranks = mx.broadcast_to(mx.arange(k, dtype=mx.float32), (slots, k))
        parts = [log_probs, mx.exp(log_probs), log_probs - log_probs[:, :1]]
        features = mx.stack([*parts, ranks / max(k - 1, 1), (ranks == 0).astype(mx.float32)], -1)
        y = features.astype(embedded.dtype)
        for part in self.feature_mlp:
            y = part(y)
        x = self.token_proj(embedded) if "token_proj" in self else embedded
        x = x + self.pass_hidden_proj(normed)[:, None] + y
        x = x + self.slot_embedding[0, 0] + self.rank_embedding[0, 0]
        x = x.reshape(slots * k, -1)
        slot = mx.repeat(mx.arange(slots), k)
        distance = slot[:, None] - slot
        bias = self.relative_slot_bias[:, distance + slots]
        bias = bias + self.same_slot_bias[:, None, None] * (distance == 0)
        for layer in self.layers:
            x = layer(x, bias)
        known = self.anchor_norm(self.context_proj(anchor[None]))
        x = self.output_norm(x)
        joint = mx.concatenate([x, mx.broadcast_to(known, x.shape), x * known], -1)
        factors = nn.silu(self.factor_input_proj(joint)).reshape(slots, k, -1)
        after = self._unit(self.in_head(factors))
        start = mx.broadcast_to(self._unit(self.anchor_out_head(known)), (1, *after.shape[1:]))
        before = mx.concatenate([start, self._unit(self.out_head(factors))[:-1]])
        return self.shape.logit_scale * before @ after.swapaxes(-1, -2)

    def _unit(self, x: mx.array) -> mx.array:
        x = x.astype(mx.float32)
        lengths = mx.linalg.norm(x, axis=-1, keepdims=True)
        return x / mx.maximum(lengths, self.shape.vector_eps)


HEADS: Mapping[str, type[ConditionalHead] | type[RecurrentCell] | type[Correlation]] = {
    "swiglu": SwiGLU,
    "linear": Linear,
    "selector": Selector,
    "vanilla": Markov,
    "gated": Markov,
    "rnn": MarkovRNN,
    "domino": Domino,
    "xpress": XPress,
    "lilicorr": Correlation,
}
"""By `DrafterConfig.head`; made with the configuration, I and the size of the target's vocabulary.
"""


def take_rows(x: mx.array, rows: mx.array) -> mx.array:
    """(batch, n, size) from (batch, D, size): the entries in (batch, n) rows."""
    return mx.take_along_axis(x, rows[..., None], 1)


class ARHead:
    """`treeflash.decoding.interfaces.ARHead` in MLX, for a head of one previous token."""

    def __init__(self, module: ConditionalHead, model: DrafterModel, target: Target) -> None:
        self.module = module
        self.output = OutputStage(model, target)

    def transitions(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:
        """Score the rows of all sequences together."""
        slots = Slots.read(self.output, mx.concatenate([block.hidden for block in blocks]))
        batch = len(blocks)
        logits = self.output.logits(slots.normed)
        depths = len(logits) // batch
        noise = None
        if options.noise is not None:
            noise = self.output.noise(options.noise)
        noisy = logits.astype(mx.float32) if noise is None else logits + noise
        marginal = log_softmax(noisy / options.temperature)
        logits, marginal = (x.reshape(batch, depths, -1) for x in (logits, marginal))
        vocab = self._vocab(marginal, options.shortlist)
        if vocab is not None:
            logits, marginal = (mx.take_along_axis(x, vocab, 2) for x in (logits, marginal))
        size = marginal.shape[-1]
        m, k = min(options.m, size), min(options.k, size)
        kept, previous = _scored_rows(marginal[:, :-1], m, options.rows)
        if vocab is not None:
            lists = take_rows(vocab, kept // m) if vocab.shape[1] > 1 else vocab
            previous = mx.take_along_axis(lists, previous[..., None], 2)[..., 0]
        previous = self.output.to_target(previous)
        # Of the D * M rows: the root's, and those kept of the M at each further depth.
        depth = mx.concatenate([mx.zeros((batch, 1), mx.int32), kept // m + 1], 1)
        roots = mx.array([[block.root] for block in blocks], mx.int32)
        last_tokens = mx.concatenate([roots, previous], 1).reshape(-1)
        rows = (depth + depths * mx.arange(batch)[:, None]).reshape(-1)
        queries = self.module.queries(slots, last_tokens, rows).reshape(*depth.shape, -1)
        scores = self.module.score(queries, ScoredTokens(self.output, logits, depth, vocab))
        if noise is not None:
            noise = noise.reshape(batch, depths, -1)
            noise = noise if vocab is None else mx.take_along_axis(noise, vocab, 2)
            scores = scores + take_rows(noise, depth)
        children, log_probs = top_log_probs(scores.reshape(-1, size), k, options.temperature)
        if vocab is not None:
            lists = take_rows(vocab, depth) if vocab.shape[1] > 1 else vocab
            children = mx.take_along_axis(lists, children.reshape(*depth.shape, k), 2)
            log_probs = log_probs + logsumexp(marginal.reshape(-1, size))[rows]
        children = self.output.to_target(children)
        # Token ids are exact in float32, and one array needs one read from the device.
        parts = [part.reshape(batch, -1) for part in (m + kept, previous, children, log_probs)]
        confidence = self.module.confidence(slots, last_tokens, rows)
        if confidence is not None:
            parts.append(confidence.reshape(batch, -1))
        read = np.array(mx.concatenate([part.astype(mx.float32) for part in parts], 1))
        ends = np.cumsum([part.shape[1] for part in parts[:-1]])
        tables = []
        for numbers in read:
            places, previous_ids, tokens, token_log_probs, *confidences = np.split(numbers, ends)
            tables.append(
                TransitionTable.from_rows(
                    places.astype(np.int32),
                    previous_ids.astype(np.int32),
                    tokens.astype(np.int32).reshape(-1, k),
                    token_log_probs.reshape(-1, k),
                    (depths, m),
                    *confidences,
                )
            )
        return tables

    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        slots, rows = Slots.read(self.output, block.hidden), mx.arange(len(block.hidden))
        logits = self.output.logits(slots.normed)
        vocab = self._vocab(logits[None], None)
        queries = self.module.queries(slots, mx.array(previous), rows)
        vocab_logits = logits[None] if vocab is None else mx.take_along_axis(logits[None], vocab, 2)
        scored = ScoredTokens(self.output, vocab_logits, rows[None], vocab)
        log_probs = log_softmax(self.module.score(queries[None], scored)[0])
        if vocab is not None:
            marginal = log_softmax(logits)
            mass = logsumexp(mx.take_along_axis(marginal, vocab[0], 1))
            impossible = mx.full(marginal.shape, -mx.inf)
            log_probs = mx.put_along_axis(impossible, vocab[0], log_probs + mass, 1)
        return np.array(self.output.over_target_vocabulary(log_probs))

    def _vocab(self, marginal: mx.array, shortlist: int | None) -> mx.array | None:
        """The tokens that are scored, of the drafter's vocabulary; None for all.

        They are (batch, D, v) candidates of each depth, or (batch, 1, v) tokens of the whole block,
        ascending. `marginal` is (batch, D, Vd), in the order of the marginal probabilities.
        """
        batch, depths, vocab_size = marginal.shape
        if (candidates := self.module.candidates) is not None:
            best = top_indices(marginal.reshape(-1, vocab_size), min(candidates, vocab_size))
            return mx.sort(best.reshape(batch, depths, -1))
        if shortlist is not None and shortlist < vocab_size:
            return mx.sort(top_indices(marginal.max(1), shortlist))[:, None]
        return None


def _scored_rows(marginal: mx.array, m: int, rows: int | None) -> tuple[mx.array, mx.array]:
    """(batch, r) ascending indices, and (batch, r) previous tokens whose children are scored.

    The indices are into the (D - 1) * m most probable tokens of a sequence, by (batch, D - 1,
    vocab) log probabilities. `rows` of them are kept, the most probable ones; None keeps all.
    """
    batch, depths, vocab = marginal.shape
    if not depths:  # a block of two; MLX before 0.32.4 crashes when it sorts nothing
        return mx.zeros((batch, 0), mx.int32), mx.zeros((batch, 0), mx.int32)
    flat = marginal.reshape(-1, vocab)
    best = top_indices(flat, m)
    weights = mx.take_along_axis(flat, best, 1).reshape(batch, -1)
    kept = mx.sort(mx.argsort(-weights)[:, :rows]).astype(mx.int32)
    return kept, mx.take_along_axis(best.reshape(batch, -1), kept, 1)


class CorrelationHead(CandidateHead):
    """`treeflash.decoding.interfaces.ARHead` in MLX, for the head of LiLiCorr."""

    def __init__(self, module: Correlation, model: DrafterModel, target: Target) -> None:
        self.module = module
        self.output = OutputStage(model, target)
        self.vocab_size = target.vocab_size

    def candidates(
        self, block: Block
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
        assert block.anchor is not None
        normed = self.output.norm(block.slots[self.output.config.first_slot :])
        marginal = log_softmax(self.output.logits(normed))
        tokens = top_indices(marginal, self.output.config.selector_top_k)
        log_probs = mx.take_along_axis(marginal, tokens, -1)
        embedded = self.output.embed(tokens)
        scores = self.module(embedded, normed, log_probs, block.anchor)
        mx.eval(tokens, log_probs, scores)
        return np.array(tokens, np.int32), np.array(log_probs), np.array(scores)


class RecurrentHead:
    """`treeflash.decoding.interfaces.ARHead` in MLX, for a head with a state for each path."""

    def __init__(self, module: RecurrentCell, model: DrafterModel, target: Target) -> None:
        self.module = module
        self.output = OutputStage(model, target)

    def transitions(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:
        """Compute logits for all sequences together, then follow the paths of each sequence."""
        slots = Slots.read(self.output, mx.concatenate([block.hidden for block in blocks]))
        batch = len(blocks)
        logits = self.output.logits(slots.normed)
        if options.noise is not None:
            logits = logits + self.output.noise(options.noise)
        parts = zip(blocks, mx.split(slots.normed, batch), mx.split(logits, batch), strict=True)
        return [
            self._table(block, Slots(self.output, block.hidden, normed), logits, options)
            for block, normed, logits in parts
        ]

    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        slots = Slots.read(self.output, block.hidden)
        logits = self.output.logits(slots.normed).astype(mx.float32)
        state = self.module.start(self.output, block)
        rows = []
        for depth, token in enumerate(mx.array(previous)):
            state, queries = self.module.step(slots, state, token[None], depth)
            bias = self.module.token_rows.as_linear(queries)
            rows.append(logits[depth] + bias.astype(mx.float32))
        log_probs = log_softmax(mx.concatenate(rows))
        return np.array(self.output.over_target_vocabulary(log_probs))

    def _table(
        self, block: Block, slots: Slots, logits: mx.array, options: TableOptions
    ) -> TransitionTable:
        """The table of one sequence, from its slots and (D, Vd) logits with their noise."""
        temperature = options.temperature
        width = options.m if options.rows is None else min(options.m, options.rows)
        logits, keys, vocab, mass = logits.astype(mx.float32), None, None, None
        if options.shortlist is not None and options.shortlist < logits.shape[1]:
            marginal = log_softmax(logits / temperature)
            vocab = mx.sort(top_indices(marginal.max(0, keepdims=True), options.shortlist)[0])
            mass = logsumexp(marginal[:, vocab])
            keys, logits = self.module.token_rows(vocab), logits[:, vocab]
        k = min(options.k, logits.shape[1])
        state, previous = self.module.start(self.output, block), mx.array([block.root], mx.int32)
        path_log_probs = mx.zeros(1)
        arrays = []
        for depth in range(len(logits)):
            state, queries = self.module.step(slots, state, previous, depth)
            table = self.module.token_rows
            bias = table.as_linear(queries) if keys is None else queries @ keys.T
            scores = logits[depth] + bias.astype(mx.float32)
            tokens, log_probs = top_log_probs(scores, k, temperature)
            if vocab is not None and mass is not None:
                tokens, log_probs = vocab[tokens], log_probs + mass[depth]
            tokens = self.output.to_target(tokens)
            child_log_probs = (path_log_probs[:, None] + log_probs).reshape(-1)
            # The first child is the chain's, which must not end here.
            ranks = mx.concatenate([mx.array([mx.inf]), child_log_probs[1:]])
            kept = mx.argsort(-ranks)[:width]
            confidence = self.module.confidence(slots, previous, mx.full(previous.shape, depth))
            arrays.append([tokens.reshape(-1), log_probs.reshape(-1), kept])
            if confidence is not None:
                arrays[-1].append(confidence)
            previous, path_log_probs = tokens.reshape(-1)[kept], child_log_probs[kept]
            state = state[kept // k]
        # Token ids are exact in float32, and one array needs one read from the device.
        flat = [x.astype(mx.float32) for depth_arrays in arrays for x in depth_arrays]
        numbers = np.split(np.array(mx.concatenate(flat)), np.cumsum([len(x) for x in flat])[:-1])
        parts = len(arrays[0])
        tokens_, log_probs_, kept_, *confidences = (numbers[i::parts] for i in range(parts))
        return TransitionTable.from_paths(
            [x.astype(np.int32) for x in tokens_],
            log_probs_,
            [x.astype(np.int32) for x in kept_],
            *confidences,
        )
