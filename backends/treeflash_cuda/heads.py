"""The conditional heads: their weights, how they score tokens, and the tables they give.

A head of `HEADS` is a module with the tensors of its format. A `ConditionalHead` is first-order:
its scores depend on the slot and on one previous token. A `RecurrentCell` has a state for the path
of previous tokens, and `RecurrentHead` follows the paths depth by depth. All scores are logits
before the temperature.

`ARHead` computes the tables of all sequences together, although sequences may differ in the tokens
that are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.decoding.backend_base import CandidateHead
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.config import Correlation as CorrelationShape
from treeflash.drafters.config import DrafterConfig
from treeflash_cuda.drafter import Block, BlockBatch, OutputStage, concatenate
from treeflash_cuda.drafter_model import DrafterModel, RMSNorm
from treeflash_cuda.graphs import Outputs, power_of_four, power_of_two
from treeflash_cuda.linear import PairLinear, RowIndex, take, token_products
from treeflash_cuda.numerics import divide_by_temperature, largest, top_log_probs, topk, upload
from treeflash_cuda.target import Target

NORM_EPS = 1e-6
MANY = 1 << 30
"""In the place of a size without a limit."""


@dataclass(frozen=True, eq=False)
class Slots:
    """The outputs of the drafter at the slots of blocks, which follow one another."""

    output: OutputStage  # of the drafter
    hidden: Tensor  # (slots, hidden_size) outputs of the last layer
    normed: Tensor  # (slots, hidden_size) u = norm(hidden)

    @classmethod
    def read(cls, output: OutputStage, hidden: Tensor) -> Slots:
        return cls(output, hidden, output.norm(hidden))


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    output: OutputStage  # of the drafter
    logits: Tensor  # (slots, v) of the marginals, of these tokens
    rows: RowIndex  # (n,) the slot of each query
    # Of the drafter's vocabulary: (v,); or (blocks, v), with equally many queries in each block; or
    # (slots, v) for a head with candidates. None for all.
    tokens: Tensor | None


class Head(nn.Module):
    """A head of a drafter, with its tensors under their names in checkpoints."""

    def confidence(self, slots: Slots, previous: Tensor, rows: RowIndex) -> Tensor | None:
        """(n,) expected acceptance of a row's tokens, 0 to 1; None if the head does not predict it.

        The (n,) previous tokens are of the target's vocabulary; `rows` are their slots.
        """
        return None


class ConditionalHead(Head):
    """A head whose scores depend on a slot and one previous token."""

    # Tokens of a slot that the head scores, the most probable by their marginal; None for all.
    candidates: int | None = None

    def queries(self, slots: Slots, previous: Tensor, rows: RowIndex) -> Tensor:
        """(n, size) vectors that `score` compares with tokens; see `Head.confidence`."""
        raise NotImplementedError

    def score(self, queries: Tensor, scored: ScoredTokens) -> Tensor:
        """(n, v) scores of (n, size) queries in float32, or in the dtype of the output head."""
        raise NotImplementedError


class RecurrentCell(Head):
    """A head with a state for each path of previous tokens, and a bias on its children's logits."""

    @property
    def token_rows(self) -> Tensor:
        """(Vd, r) of the drafter's tokens: the products of the rows with a query are the bias."""
        raise NotImplementedError

    def start(self, output: OutputStage, block: Block) -> Tensor:
        """The (1, state_size) state before the root."""
        return block.hidden.new_zeros(1, output.config.head_state_size)

    def step(
        self, slots: Slots, state: Tensor, previous: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Advance n paths by their (n,) last tokens, of the target's vocabulary.

        The (n, state_size) state of the paths without that token is `start` before the root; the
        depth of the children counts from 0. Returns (n, state_size) states, and (n, r) queries.
        """
        raise NotImplementedError


class Corrected(ConditionalHead):
    """TreeFlash: h' = h + correction([embedding; u]), read by the output head."""

    def correction(self, embedded: Tensor, normed: Tensor, rows: RowIndex) -> Tensor:
        """(n, hidden_size) corrections, from (n, hidden_size) embeddings of previous tokens.

        `rows` are their rows of the (slots, hidden_size) u.
        """
        raise NotImplementedError

    def queries(self, slots: Slots, previous: Tensor, rows: RowIndex) -> Tensor:
        correction = self.correction(slots.output.embed(previous), slots.normed, rows)
        return slots.output.norm(take(slots.hidden, rows) + correction)

    def score(self, queries: Tensor, scored: ScoredTokens) -> Tensor:
        return scored.output.logits(queries, scored.tokens)


class SwiGLU(Corrected):
    """The correction D(silu(G(x)) * U(x))."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__()
        h = config.hidden_size
        self.norm = RMSNorm(h, NORM_EPS)
        self.ug = PairLinear(h, 2 * inner_size, bias=True)
        self.d = nn.Linear(inner_size, h, bias=False)

    def correction(self, embedded: Tensor, normed: Tensor, rows: RowIndex) -> Tensor:
        up, gate = self.ug(self.norm(embedded), normed, rows).chunk(2, -1)
        return self.d(up * F.silu(gate))


class Linear(Corrected):
    """The paper's ablation D(x), linear in the previous token and the hidden state."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__()
        h = config.hidden_size
        self.norm = RMSNorm(h, NORM_EPS)
        self.d = PairLinear(h, h, bias=False)

    def correction(self, embedded: Tensor, normed: Tensor, rows: RowIndex) -> Tensor:
        return self.d(self.norm(embedded), normed, rows)


class Selector(ConditionalHead):
    """DFlash2: U(b) + <A[a] * W u, B[b]> for the candidates b of a slot."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__()
        rank = config.head_rank
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.empty(vocab_size, rank))
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)
        self.candidates = config.selector_top_k

    def queries(self, slots: Slots, previous: Tensor, rows: RowIndex) -> Tensor:
        projected = self.hidden_projection(slots.normed)
        return take(self.predecessor_codebook, previous) * take(projected, rows)

    def score(self, queries: Tensor, scored: ScoredTokens) -> Tensor:
        assert scored.tokens is not None
        keys = self.successor_codebook[take(scored.tokens, scored.rows)]
        terms = (keys.float() @ queries.float()[:, :, None])[..., 0]
        return terms + take(scored.logits, scored.rows).float()


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
            self.confidence_head = nn.ModuleDict({"proj": nn.Linear(width, 1)})

    def confidence(self, slots: Slots, previous: Tensor, rows: RowIndex) -> Tensor | None:
        if not self.config.confidence_head:
            return None
        x = take(slots.normed, rows)
        if self.config.confidence_with_markov:
            x = torch.cat([x, self.markov_w1(previous)], -1)
        return self.confidence_head["proj"](x)[:, 0].float().sigmoid()


class Markov(MarkovTensors, ConditionalHead):
    """DSpark: z(b) + <W2[b], e>, where e = W1[a], or a gated form of it."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        if config.head == "gated":
            self.gate_proj = nn.Linear(config.hidden_size + config.head_rank, config.head_rank)

    def queries(self, slots: Slots, previous: Tensor, rows: RowIndex) -> Tensor:
        embedded = self.markov_w1(previous)
        if self.config.head == "gated":
            gate = self.gate_proj(torch.cat([take(slots.normed, rows), embedded], -1))
            embedded = embedded * gate.sigmoid()
        return embedded

    def score(self, queries: Tensor, scored: ScoredTokens) -> Tensor:
        products = token_products(queries, self.markov_w2.weight, scored.tokens)
        return products.float() + take(scored.logits, scored.rows).float()


class MarkovRNN(MarkovTensors, RecurrentCell):
    """DSpark: z(b) + <W2[b], tanh(o)>, a gated recurrent unit over W1[a] and the hidden state."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        rank = config.head_rank
        self.joint_proj = nn.Linear(2 * rank + config.hidden_size, 3 * rank)

    @property
    def token_rows(self) -> Tensor:
        return self.markov_w2.weight

    def step(
        self, slots: Slots, state: Tensor, previous: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        embedded = self.markov_w1(previous)
        normed = slots.normed[depth].expand(len(embedded), -1)
        x = self.joint_proj(torch.cat([state, embedded, normed], -1))
        gate, candidate, out = x.chunk(3, -1)
        gate = gate.sigmoid()
        return gate * state + (1 - gate) * candidate.tanh(), out.tanh()


class GRU(nn.Module):
    """A GRU without biases, with PyTorch's names for its tensors."""

    def __init__(self, size: int, state_size: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * state_size, size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * state_size, state_size))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """(n, state_size) states from (n, size) inputs and (n, state_size) states."""
        return torch.gru_cell(x, state, self.weight_ih_l0, self.weight_hh_l0)


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
        self.embed_proj = nn.ModuleDict(
            {"0": nn.Linear(h + g, rank, bias=False), "2": nn.Embedding(vocab_size, rank)}
        )

    @property
    def token_rows(self) -> Tensor:
        table: Any = self.embed_proj["2"]
        return table.weight

    def step(
        self, slots: Slots, state: Tensor, previous: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        state = self.prefix_gru(slots.output.embed(previous), state)
        if depth + 1 < self.config.head_from_depth:
            return state, state.new_zeros(len(state), self.config.head_rank)
        x = torch.cat([slots.normed[depth].expand(len(state), -1), state], -1)
        return state, F.silu(self.embed_proj["0"](x))


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
        self.mix_l = nn.Parameter(torch.empty(r, slots, slots))
        self.mlp_gate, self.mlp_up = (
            nn.Linear(r, inner, bias=False),
            nn.Linear(r, inner, bias=False),
        )
        self.mlp_down = nn.Linear(inner, r, bias=False)
        # No linear layer here: its rows are also taken for single tokens.
        self.readout = nn.Embedding(config.draft_vocab_size or vocab_size, r)

    @property
    def token_rows(self) -> Tensor:
        return self.readout.weight

    def start(self, output: OutputStage, block: Block) -> Tensor:
        normed = output.norm(block.slots)
        inputs = super().start(output, block).unflatten(1, (-1, len(self.mix_l)))
        inputs[:, 0] = self.down_g(normed.mean(0, keepdim=True))
        before = torch.full((1,), block.before, device=normed.device)
        inputs[:, 1] = self._input(inputs, normed[0], before)
        return inputs.flatten(1)

    def step(
        self, slots: Slots, state: Tensor, previous: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        inputs, slot = state.unflatten(1, (-1, len(self.mix_l))).clone(), depth + 1
        inputs[:, 1 + slot] = new = self._input(inputs, slots.normed[depth], previous)
        mix = self.mix_l[:, slot, : slot + 1]
        x = new + torch.einsum("njr,rj->nr", inputs[:, 1 : slot + 2], mix)
        x = x + self.mlp_down(F.silu(self.mlp_gate(x)) * self.mlp_up(x))
        return inputs.flatten(1), x

    def _input(self, inputs: Tensor, normed: Tensor, previous: Tensor) -> Tensor:
        """(n, r) inputs of a slot after (n,) previous tokens."""
        embedded = self.token_embed(previous)
        hidden = self.down_h(normed[None]).expand_as(embedded)
        return self.in_proj(torch.cat([hidden, inputs[:, 0], embedded], -1))


class BiasedAttention(nn.Module):
    """Attention with a bias on its scores, with the tensors of PyTorch's `MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(n, width) from (n, width) and a (heads, n, n) bias."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(y.transpose(0, 1).flatten(1))


class CorrelationLayer(nn.Module):
    """A layer of LiLiCorr's transformer, whose attention has a bias by slots."""

    def __init__(self, shape: CorrelationShape, eps: float) -> None:
        super().__init__()
        w = shape.hidden_size
        self.attn_norm, self.mlp_norm = RMSNorm(w, eps), RMSNorm(w, eps)
        self.attn = BiasedAttention(w, shape.heads)
        self.mlp = nn.Sequential(
            nn.Linear(w, shape.inner_size), nn.SiLU(), nn.Linear(shape.inner_size, w)
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(n, w) nodes from (n, w) nodes and a (heads, n, n) bias."""
        x = x + self.attn(self.attn_norm(x), bias)
        return x + self.mlp(self.mlp_norm(x))


class Correlation(Head):
    """LiLiCorr: products of vectors that a transformer over all candidates of a block computes."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__()
        assert config.correlation is not None
        self.shape = shape = config.correlation
        h, w, r, slots = config.hidden_size, shape.hidden_size, config.head_rank, config.depths
        self.token_proj = nn.Linear(h, w) if w != h else nn.Identity()
        self.pass_hidden_proj, self.context_proj = nn.Linear(h, w), nn.Linear(h, w)
        self.feature_mlp = nn.Sequential(
            nn.LayerNorm(5), nn.Linear(5, w), nn.SiLU(), nn.Linear(w, w)
        )
        self.factor_input_proj = nn.Linear(3 * w, w)
        self.out_head, self.in_head, self.anchor_out_head = (nn.Linear(w, r) for _ in range(3))
        eps = config.rms_norm_eps
        self.anchor_norm, self.output_norm = RMSNorm(w, eps), RMSNorm(w, eps)
        self.rank_embedding = nn.Parameter(torch.empty(1, 1, 1, config.selector_top_k, w))
        self.slot_embedding = nn.Parameter(torch.empty(1, 1, slots, 1, w))
        self.relative_slot_bias = nn.Parameter(torch.empty(shape.heads, 2 * slots + 1))
        self.same_slot_bias = nn.Parameter(torch.empty(shape.heads))
        self.layers = nn.ModuleList(CorrelationLayer(shape, eps) for _ in range(shape.layers))

    def forward(
        self, embedded: Tensor, normed: Tensor, log_probs: Tensor, anchor: Tensor
    ) -> Tensor:
        """(S - 1, k, k) scores of candidates after the candidates of the slot before.

        From (S - 1, k, hidden_size) embeddings of candidates, best first, (S - 1, hidden_size) u,
        the (S - 1, k) log probabilities, and the (hidden_size,) context of the last position.
        """
        slots, k = log_probs.shape
        ranks = torch.arange(k, device=log_probs.device, dtype=torch.float32).expand(slots, k)
        parts = [log_probs, log_probs.exp(), log_probs - log_probs[:, :1]]
        features = torch.stack([*parts, ranks / max(k - 1, 1), (ranks == 0).float()], -1)
        x = self.token_proj(embedded) + self.pass_hidden_proj(normed)[:, None]
        x = x + self.feature_mlp(features.to(x.dtype))
        x = (x + self.slot_embedding[0, 0] + self.rank_embedding[0, 0]).flatten(0, 1)
        slot = torch.arange(slots, device=x.device).repeat_interleave(k)
        distance = slot[:, None] - slot
        bias = self.relative_slot_bias[:, distance + slots]
        bias = bias + self.same_slot_bias[:, None, None] * (distance == 0)
        for layer in self.layers:
            x = layer(x, bias)
        known = self.anchor_norm(self.context_proj(anchor))
        x = self.output_norm(x)
        joint = torch.cat([x, known.expand_as(x), x * known], -1)
        factors = F.silu(self.factor_input_proj(joint)).unflatten(0, (slots, k))
        start = self._unit(self.anchor_out_head(known)).expand(1, k, -1)
        before = torch.cat([start, self._unit(self.out_head(factors))[:-1]])
        return self.shape.logit_scale * before @ self._unit(self.in_head(factors)).mT

    def _unit(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1, eps=self.shape.vector_eps)


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
"""By `DrafterConfig.head`; made with the configuration, I and the target's vocabulary size."""


MIN_ROWS, MIN_SHORTLIST = 64, 1024
"""Smaller tables share a graph: reading the head's weights takes most of their time."""


def _rounded(options: TableOptions, vocab_size: int) -> TableOptions:
    """Larger options that more tables share; the further rows and tokens are dropped."""
    rows, shortlist = options.rows, options.shortlist
    if shortlist is not None and max(options.m, options.k) <= shortlist < vocab_size:
        # The whole vocabulary would be no shortlist.
        shortlist = min(max(power_of_two(shortlist), MIN_SHORTLIST), vocab_size - 1)
    if rows is not None:
        rows = max(power_of_four(rows), MIN_ROWS)
    return replace(options, rows=rows, shortlist=shortlist)


class ARHead:
    """`treeflash.decoding.interfaces.ARHead` in PyTorch, for a head of one previous token."""

    def __init__(self, module: ConditionalHead, model: DrafterModel, target: Target) -> None:
        self.module = module
        self.output = OutputStage(model, target)
        self.graphs = target.graphs

    @torch.inference_mode()
    def transitions(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:
        """Compute the products of all sequences together."""
        graphs, depths, limits = self.graphs, len(blocks[0].hidden), []
        batch = BlockBatch.join(blocks, self.output.upload(options.noise), graphs)
        computed = replace(options, noise=None)
        if graphs.is_capturing:
            computed = _rounded(computed, self.output.vocab_size)
            sizes = depths, options.rows or MANY, options.shortlist or MANY
            limits.append(upload(np.array(sizes, np.int32), graphs.device))

        def search(hidden: Tensor, roots: Tensor, noise: Tensor, *limits: Tensor) -> Outputs:
            return self._search(hidden, roots, self.output.noise(noise), computed, *limits)

        inputs = batch.hidden, batch.roots, batch.noise, *limits
        results, m, k = graphs.run("the AR head", computed, search, *inputs)
        rows = 1 + min(options.rows or MANY, (depths - 1) * m)
        numbers = results.unflatten(0, (len(batch.roots), -1)).cpu().numpy()
        tables = []
        for part in numbers[: len(blocks), :rows]:
            (places, previous), floats = part[1:, :2].T, part[:, 2 + k :].view(np.float32)
            confidences = floats[:, k] if floats.shape[1] > k else None
            children = part[:, 2 : 2 + k], floats[:, :k]
            table = places, previous, *children, (depths, m), confidences
            tables.append(TransitionTable.from_rows(*table))
        return tables

    @torch.inference_mode()
    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        slots = Slots.read(self.output, block.hidden)
        logits = self.output.logits(slots.normed)
        tokens = torch.from_numpy(previous).to(logits.device)
        queries = self.module.queries(slots, tokens, None)
        if self.module.candidates is None:
            scores = self.module.score(queries, ScoredTokens(self.output, logits, None, None))
            log_probs = scores.float().log_softmax(-1)
        else:
            marginals = logits.float().log_softmax(-1)
            mass, vocab = topk(marginals, self.module.candidates)
            scored = ScoredTokens(self.output, logits.gather(1, vocab), None, vocab)
            scores = self.module.score(queries, scored).log_softmax(-1)
            scores = scores + mass.logsumexp(-1, keepdim=True)
            log_probs = torch.full_like(marginals, -torch.inf).scatter(1, vocab, scores)
        return self.output.over_target_vocabulary(log_probs).cpu().numpy()

    def _search(
        self,
        hidden: Tensor,  # (blocks * D, hidden_size) outputs
        roots: Tensor,  # (blocks,)
        noise: Tensor | None,  # (blocks * D, Vd), added to the logits
        options: TableOptions,  # whose noise is not used
        # (3,) numbers of depths, rows and tokens of the shortlist, beyond which nothing is used;
        # None uses everything.
        limits: Tensor | None = None,
    ) -> Outputs:
        """The numbers of the tables, rows per depth, and children of a row.

        The int32 numbers are (blocks * n, 2 + 2 k), for one read from the device: the rows' places
        among all D * m rows, ascending, previous tokens, children, and log probabilities; then
        confidences, if the head predicts them. The rows that are used come first.
        """
        blocks, device = len(roots), hidden.device
        slots = Slots.read(self.output, hidden)
        logits = self.output.logits(slots.normed)
        noisy = logits if noise is None else logits + noise
        marginals = divide_by_temperature(noisy, options.temperature).log_softmax(-1)
        by_block = marginals.unflatten(0, (blocks, -1))
        depths, size = by_block.shape[1:]
        # (v,) tokens for one block, (blocks, v) for more, or (slots, v) for a head with candidates.
        vocab, used = None, None
        if self.module.candidates is not None:
            best, vocab = topk(marginals, self.module.candidates)
            by_block = best.unflatten(0, (blocks, -1))
        elif options.shortlist is not None and options.shortlist < size:
            vocab, used = self._shortlist(by_block, options.shortlist, limits)
            by_block = by_block.gather(2, vocab[:, None].expand(-1, depths, -1))
            if used is not None:
                by_block = by_block.masked_fill(~used[:, None], -torch.inf)
        mass, m = by_block.logsumexp(-1).flatten(), min(options.m, by_block.shape[2])
        weights, previous = topk(by_block[:, :-1].flatten(0, 1), m)
        weights, count = weights.view(blocks, -1), (depths - 1) * m
        if vocab is not None:
            previous_vocab = vocab
            if len(vocab) > blocks:
                previous_vocab = vocab.unflatten(0, (blocks, -1))[:, :-1].flatten(0, 1)
            previous = previous_vocab.gather(1, previous.view(len(previous_vocab), -1))
        previous = self.output.to_target(previous.view(blocks, -1))
        if limits is not None:
            later = torch.arange(count, device=device) >= (limits[0] - 1) * m
            weights = weights.masked_fill(later, -torch.inf)
        ranked = weights.argsort(dim=1, descending=True, stable=True)[:, : options.rows]
        if limits is not None:  # after the others
            used_rows = torch.minimum(limits[1], (limits[0] - 1) * m)
            places = torch.arange(ranked.shape[1], device=device)
            ranked = ranked.masked_fill(places >= used_rows, count)
        places = ranked.sort(1).values
        previous = torch.cat(
            [roots[:, None].to(previous.dtype), previous.gather(1, places.clamp(max=count - 1))], 1
        ).flatten()
        places = F.pad(places + m, (1, 0))
        block = torch.arange(blocks, device=device)[:, None]
        rows = ((places // m).clamp(max=depths - 1) + block * depths).flatten()
        queries = self.module.queries(slots, previous, rows)
        tokens = vocab[0] if vocab is not None and len(vocab) == 1 else vocab
        scored = ScoredTokens(self.output, _columns(logits, tokens), rows, tokens)
        scores = self.module.score(queries, scored)
        if noise is not None:
            scores = scores + take(_columns(noise, tokens), rows)
        if used is not None:
            by_row = used.repeat_interleave(places.shape[1], 0, output_size=len(rows))
            scores = scores.masked_fill(~by_row, -torch.inf)
        children, log_probs = top_log_probs(scores, options.k, options.temperature)
        if vocab is not None:
            index = rows[:, None] if len(vocab) > blocks else block.expand_as(places).reshape(-1, 1)
            children = take(vocab.flatten(), (children + index * vocab.shape[1]).flatten())
            children = children.view(log_probs.shape).int()
            log_probs += take(mass, rows)[:, None]
        children = self.output.to_target(children)
        ids = torch.stack([places.flatten(), previous], 1).int()
        parts = [ids, children, log_probs.view(torch.int32)]
        confidence = self.module.confidence(slots, previous, rows)
        if confidence is not None:
            parts.append(confidence[:, None].view(torch.int32))
        return torch.cat(parts, 1), m, children.shape[1]

    def _shortlist(
        self, marginals: Tensor, size: int, limits: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(blocks, size) tokens of the shortlists, ascending, from (blocks, D, Vd) marginals.

        With limits also (blocks, size) whether a token is used.
        """
        if limits is None:
            return largest(marginals.amax(1), size), None
        depths = torch.arange(marginals.shape[1], device=marginals.device)
        best = marginals.masked_fill((depths >= limits[0])[:, None], -torch.inf).amax(1)
        vocab, ranks = topk(best, size)[1].sort(1)
        return vocab, ranks < limits[2]


def _columns(x: Tensor, tokens: Tensor | None) -> Tensor:
    """(slots, v) of (slots, Vd): the columns of tokens, as `ScoredTokens.tokens` gives them."""
    if tokens is None:
        return x
    if tokens.ndim == 1:
        return x.index_select(1, tokens)
    slots = len(x) // len(tokens)
    return x.gather(1, tokens if slots == 1 else tokens.repeat_interleave(slots, 0))


class CorrelationHead(CandidateHead):
    """`treeflash.decoding.interfaces.ARHead` in PyTorch, for the head of LiLiCorr."""

    def __init__(self, module: Correlation, model: DrafterModel, target: Target) -> None:
        self.module = module
        self.output = OutputStage(model, target)
        self.vocab_size = target.vocab_size

    @torch.inference_mode()
    def candidates(
        self, block: Block
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
        assert block.anchor is not None
        normed = self.output.norm(block.all_hidden)
        marginal = self.output.logits(normed).float().log_softmax(-1)
        log_probs, tokens = topk(marginal, self.output.config.selector_top_k)
        embedded = self.output.embed(tokens)
        scores = self.module(embedded, normed, log_probs, block.anchor)
        return tokens.int().cpu().numpy(), log_probs.cpu().numpy(), scores.cpu().numpy()


class RecurrentHead:
    """`treeflash.decoding.interfaces.ARHead` in PyTorch, for a head with a state for each path."""

    def __init__(self, module: RecurrentCell, model: DrafterModel, target: Target) -> None:
        self.module = module
        self.output = OutputStage(model, target)

    @torch.inference_mode()
    def transitions(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:
        """Compute the logits of all sequences together, then follow the paths of each sequence."""
        slots = Slots.read(self.output, concatenate([block.hidden for block in blocks]))
        depths = len(slots.hidden) // len(blocks)
        logits = self.output.logits(slots.normed)
        if (noise := self.output.noise(self.output.upload(options.noise))) is not None:
            logits = logits + noise
        parts = zip(blocks, slots.normed.split(depths), logits.split(depths), strict=True)
        return [
            self._table(block, replace(slots, normed=normed), part, options)
            for block, normed, part in parts
        ]

    @torch.inference_mode()
    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        slots = Slots.read(self.output, block.hidden)
        logits, state = self.output.logits(slots.normed), self.module.start(self.output, block)
        rows = []
        for depth, token in enumerate(torch.from_numpy(previous).to(logits.device)):
            state, queries = self.module.step(slots, state, token[None], depth)
            bias = queries @ self.module.token_rows.T
            rows.append(logits[depth].float() + bias.float())
        log_probs = torch.cat(rows).log_softmax(-1)
        return self.output.over_target_vocabulary(log_probs).cpu().numpy()

    def _table(
        self, block: Block, slots: Slots, logits: Tensor, options: TableOptions
    ) -> TransitionTable:
        """The table of one sequence, from its slots and (D, Vd) logits with their noise."""
        temperature = options.temperature
        width = options.m if options.rows is None else min(options.m, options.rows)
        token_rows, vocab, mass = self.module.token_rows, None, None
        if options.shortlist is not None and options.shortlist < logits.shape[1]:
            marginal = divide_by_temperature(logits, temperature).log_softmax(-1)
            (vocab,) = largest(marginal.amax(0, keepdim=True), options.shortlist)
            mass = marginal.index_select(1, vocab).logsumexp(-1)
            token_rows, logits = take(token_rows, vocab), logits.index_select(1, vocab)
        k = min(options.k, logits.shape[1])
        state = self.module.start(self.output, block)
        previous = torch.full((1,), block.root, device=logits.device)
        path_log_probs = logits.new_zeros(1, dtype=torch.float32)
        arrays = []
        for depth in range(len(logits)):
            state, queries = self.module.step(slots, state, previous, depth)
            scores = logits[depth].float() + (queries @ token_rows.T).float()
            tokens, log_probs = top_log_probs(scores, k, temperature)
            if vocab is not None and mass is not None:
                tokens, log_probs = vocab[tokens.long()].int(), log_probs + mass[depth]
            tokens = self.output.to_target(tokens)
            child_log_probs = (path_log_probs[:, None] + log_probs).flatten()
            ranks = child_log_probs.clone()
            ranks[0] = torch.inf  # the first child is the chain's, which must not end here
            kept = ranks.topk(min(width, len(ranks))).indices
            confidence = self.module.confidence(slots, previous, torch.full_like(previous, depth))
            arrays.append([tokens.flatten(), log_probs.flatten().view(torch.int32), kept.int()])
            if confidence is not None:
                arrays[-1].append(confidence.view(torch.int32))
            previous, path_log_probs = tokens.flatten()[kept].long(), child_log_probs[kept]
            state = take(state, kept // k)
        # One read from the device for all depths.
        flat = [x for depth_arrays in arrays for x in depth_arrays]
        numbers = np.split(torch.cat(flat).cpu().numpy(), np.cumsum([len(x) for x in flat])[:-1])
        parts = len(arrays[0])
        tokens_, log_probs_, kept_, *confidences = (numbers[i::parts] for i in range(parts))
        return TransitionTable.from_paths(
            tokens_,
            [x.view(np.float32) for x in log_probs_],
            kept_,
            *([x.view(np.float32) for x in part] for part in confidences),
        )
