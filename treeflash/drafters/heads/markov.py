"""The Markov heads of DSpark: a low-rank bias on the logits that depends on earlier tokens."""

from __future__ import annotations

from functools import partial

from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.format import HeadFormat
from treeflash.drafters.heads.operations import (
    Array,
    ConditionalHead,
    Head,
    Module,
    RecurrentCell,
    Rows,
    ScoredTokens,
    Slots,
)


class MarkovTensors(Head):
    """The tensors that DSpark's heads share, and their confidence head."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        h, rank = config.hidden_size, config.head_rank
        self.config = config
        self.markov_w1 = self.ops.embedding(vocab_size, rank)
        self.markov_w2 = self.ops.embedding(config.draft_vocab_size or vocab_size, rank)
        if config.confidence_head:
            width = h + rank if config.confidence_with_markov else h
            self.confidence_head = self.ops.named_children({"proj": self.ops.linear(width, 1)})

    def confidence(self, slots: Slots, previous: Array, rows: Rows) -> Array | None:
        if not self.config.confidence_head:
            return None
        x = self.ops.take(slots.normed, rows)
        if self.config.confidence_with_markov:
            x = self.ops.concatenate([x, self.markov_w1(previous)], -1)
        return self.ops.sigmoid(self.ops.float32(self.confidence_head["proj"](x)[:, 0]))


class Markov(MarkovTensors, ConditionalHead):
    """DSpark: z(b) + <W2[b], e>, where e = W1[a], or a gated form of it."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        if config.head == "gated":
            rank = config.head_rank
            self.gate_proj = self.ops.linear(config.hidden_size + rank, rank)

    def queries(self, slots: Slots, previous: Array, rows: Rows) -> Array:
        embedded = self.markov_w1(previous)
        if self.config.head == "gated":
            x = self.ops.concatenate([self.ops.take(slots.normed, rows), embedded], -1)
            embedded = embedded * self.ops.sigmoid(self.gate_proj(x))
        return embedded

    def score(self, queries: Array, scored: ScoredTokens) -> Array:
        return scored.products(queries, self.markov_w2) + scored.logits()


class MarkovRNN(MarkovTensors, RecurrentCell):
    """DSpark: z(b) + <W2[b], tanh(o)>, a gated recurrent unit over W1[a] and the hidden state."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        rank = config.head_rank
        self.joint_proj = self.ops.linear(2 * rank + config.hidden_size, 3 * rank)

    @property
    def token_rows(self) -> Module:
        return self.markov_w2

    def step(self, slots: Slots, state: Array, previous: Array, depth: int) -> tuple[Array, Array]:
        embedded = self.markov_w1(previous)
        normed = self.of_paths(slots.at(depth), len(state))
        x = self.joint_proj(self.ops.concatenate([state, embedded, normed], -1))
        gate, candidate, out = self.ops.split(x, 3)
        gate = self.ops.sigmoid(gate)
        state = gate * state + (1 - gate) * self.ops.tanh(candidate)
        return state, self.ops.tanh(out)


_head = partial(
    HeadFormat,
    family="DSpark",
    prefix="markov_head.",
    settings={
        "markov_rank": "head_rank",
        "markov_head_type": "head",
        "enable_confidence_head": "confidence_head",
        "confidence_head_with_markov": "confidence_with_markov",
    },
)
HEADS = {
    "vanilla": _head(module=Markov, training_name="markov"),
    "gated": _head(module=Markov),
    "rnn": _head(module=MarkovRNN),
}
