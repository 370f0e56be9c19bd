"""The conditional heads: how they score tokens after previous tokens, and the tables they give.

The scores of most heads depend on the slot and on one previous token; a recurrent head's depend on
all previous tokens. All scores are logits before the temperature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from treeflash.decoding.backend_base import OneByOneHead
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.output_stage import Block
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.formats import HEADS as FORMATS
from treeflash.reference.drafter_model import DrafterModel
from treeflash.reference.numerics import (
    Array,
    Ints,
    best_children,
    linear,
    log_softmax,
    rms_norm,
    sigmoid,
    silu,
    top,
)

NORM_EPS = 1e-6


class Head:
    """The weights of a conditional head."""

    def __init__(self, model: DrafterModel) -> None:
        self.model = model
        self.tensors = model.head_tensors

    def linear(self, name: str, x: Array) -> Array:
        return linear(self.tensors, name, x)

    def confidence(self, hidden: Array, previous: Ints) -> Array | None:
        """Return (D, M) stated probability that a row is right; None if the head states none."""
        return None


class Scores(Head, ABC):
    """A conditional head that depends on one previous token.

    It scores only `candidates` tokens of a slot, those with the highest marginals; None scores all.
    """

    candidates: int | None = None

    @abstractmethod
    def score(self, hidden: Array, logits: Array, previous: Ints, tokens: Ints) -> Array:
        """Return the (D, M, n) scores of (D, n) tokens of the drafter's vocabulary.

        They come from (D, hidden_size) outputs of the last layer, the (D, Vd) logits of the
        marginals, and (D, M) previous tokens of the target's vocabulary.
        """


class Corrected(Scores):
    """TreeFlash: h' = h + correction([embedding; u]), read by the output head."""

    def correction(self, x: Array) -> Array:
        """Correct (..., 2 * hidden_size): D(silu(G(x)) * U(x)), or D(x), the paper's ablation."""
        if self.model.config.head == "swiglu":
            up, gate = np.split(self.linear("ug", x), 2, -1)
            x = up * silu(gate)
        return self.linear("d", x)

    def score(self, hidden: Array, logits: Array, previous: Ints, tokens: Ints) -> Array:
        embedded = self.model.embed(previous)
        embedded = rms_norm(embedded, self.tensors["norm.weight"], NORM_EPS)
        normed = np.broadcast_to(self.model.normed("norm", hidden)[:, None], embedded.shape)
        x = hidden[:, None] + self.correction(np.concatenate([embedded, normed], -1))
        return np.take_along_axis(self.model.logits(x), tokens[:, None], -1)


class Selector(Scores):
    """DFlash2: U(b) + <A[a] * W u, B[b]> for the candidates b of a slot."""

    def __init__(self, model: DrafterModel) -> None:
        super().__init__(model)
        self.candidates = model.config.selector_top_k

    def score(self, hidden: Array, logits: Array, previous: Ints, tokens: Ints) -> Array:
        projected = self.linear("hidden_projection", self.model.normed("norm", hidden))
        query: Array = self.tensors["predecessor_codebook"][previous] * projected[:, None]
        keys = self.tensors["successor_codebook"][tokens]
        scores: Array = query @ keys.swapaxes(-1, -2)
        return scores + np.take_along_axis(logits, tokens, -1)[:, None]


class Markov(Scores):
    """DSpark: z(b) + <W2[b], e>, where e = W1[a], or a gated form of it."""

    def score(self, hidden: Array, logits: Array, previous: Ints, tokens: Ints) -> Array:
        query = self.tensors["markov_w1.weight"][previous]
        if self.model.config.head == "gated":
            gate = self.linear("gate_proj", self._with_hidden(hidden, query))
            query = query * sigmoid(gate)
        keys = self.tensors["markov_w2.weight"][tokens]
        scores: Array = query @ keys.swapaxes(-1, -2)
        return scores + np.take_along_axis(logits, tokens, -1)[:, None]

    def confidence(self, hidden: Array, previous: Ints) -> Array | None:
        if not self.model.config.confidence_head:
            return None
        x = self._with_hidden(hidden, self.tensors["markov_w1.weight"][previous])
        weight = self.tensors["confidence_head.proj.weight"][0]
        x = x[..., : len(weight)]  # the hidden part alone, if it does not read the token
        return sigmoid(x @ weight + self.tensors["confidence_head.proj.bias"])

    def _with_hidden(self, hidden: Array, rows: Array) -> Array:
        """Join the normed outputs and (D, M, r) rows of previous tokens.

        (D, M, hidden_size + r).
        """
        normed = self.model.normed("norm", hidden)[:, None]
        shape = *rows.shape[:2], normed.shape[-1]
        return np.concatenate([np.broadcast_to(normed, shape), rows], -1)


class Cell(Head, ABC):
    """A recurrent head: a state for each path, and a bias on the logits of its children.

    The bias is the product of a query with the `keys`, (Vd, r) of the drafter's tokens.
    """

    keys: Array

    @abstractmethod
    def step(self, state: Array, normed: Array, previous: Ints, depth: int) -> tuple[Array, Array]:
        """Advance n paths by their last token: (n, state_size) states and (n, r) queries.

        They come from (n, state_size) states, 0 before the root, the (hidden_size,) normalised
        output at this depth, (n,) tokens of the target's vocabulary, and the children's depth.
        """


class MarkovRNN(Cell):
    """DSpark: z(b) + <W2[b], tanh(o)>, a gated recurrent unit over W1[a] and the hidden state."""

    def __init__(self, model: DrafterModel) -> None:
        super().__init__(model)
        self.keys = self.tensors["markov_w2.weight"]

    def step(self, state: Array, normed: Array, previous: Ints, depth: int) -> tuple[Array, Array]:
        rows = self.tensors["markov_w1.weight"][previous]
        x = np.concatenate([state, rows, np.broadcast_to(normed, (len(rows), len(normed)))], -1)
        gate, candidate, out = np.split(self.linear("joint_proj", x), 3, -1)
        gate = sigmoid(gate)
        return gate * state + (1 - gate) * np.tanh(candidate), np.tanh(out)

    def confidence(self, hidden: Array, previous: Ints) -> Array | None:
        return Markov(self.model).confidence(hidden, previous)


class Domino(Cell):
    """Domino: z(b) + <W2[b], silu(W1 [u; s])>, where s is a GRU over the tokens' embeddings."""

    def __init__(self, model: DrafterModel) -> None:
        super().__init__(model)
        self.keys = self.tensors["embed_proj.2.weight"]

    def step(self, state: Array, normed: Array, previous: Ints, depth: int) -> tuple[Array, Array]:
        embedded = self.model.embed(previous)
        inputs = np.split(embedded @ self.tensors["prefix_gru.weight_ih_l0"].T, 3, -1)
        states = np.split(state @ self.tensors["prefix_gru.weight_hh_l0"].T, 3, -1)
        reset, update = (sigmoid(inputs[i] + states[i]) for i in (0, 1))
        new = np.tanh(inputs[2] + reset * states[2])
        state = (1 - update) * new + update * state
        if depth < self.model.config.head_from_depth:
            return state, np.zeros((len(state), self.keys.shape[1]), np.float32)
        x = np.concatenate([np.broadcast_to(normed, embedded.shape), state], -1)
        return state, silu(self.linear("embed_proj.0", x))


HEAD_CLASSES: dict[str, type[Scores | Cell]] = {
    "swiglu": Corrected,
    "linear": Corrected,
    "selector": Selector,
    "vanilla": Markov,
    "gated": Markov,
    "rnn": MarkovRNN,
    "domino": Domino,
}
"""By `DrafterConfig.head`."""


def make_head(model: DrafterModel) -> ARHead | RecurrentHead:
    """Make the head of a drafter, with the class that computes the tables of its kind."""
    name = model.config.head
    assert name is not None
    return TABLE_HEADS[FORMATS[name].module.kind](model, HEAD_CLASSES[name](model))


class ARHead(OneByOneHead):
    """`treeflash.decoding.interfaces.ARHead` in NumPy."""

    def __init__(self, model: DrafterModel, scores: Scores) -> None:
        self.model, self.scores = model, scores

    def transitions_one(self, block: Block, options: TableOptions) -> TransitionTable:
        hidden = block.hidden
        raw = self.model.logits(hidden)
        noise, temperature = options.noise, np.float32(options.temperature)
        added = np.zeros_like(raw) if noise is None else noise.values(self.model.token_ids)
        marginal = log_softmax((raw + added) / temperature)
        vocab = self._support(marginal, options.shortlist)
        marginal = np.take_along_axis(marginal, vocab, -1)
        best, _ = top(marginal[:-1], options.m)
        weights = np.take_along_axis(marginal[:-1], best, -1)
        previous = self.model.token_ids[np.take_along_axis(vocab[:-1], best, -1)]
        first = np.full((1, previous.shape[1]), block.root, np.int32)
        before = np.concatenate([first, previous])
        scores = self.scores.score(hidden, raw, before, vocab)
        scores = scores + np.take_along_axis(added, vocab, -1)[:, None]
        best, log_probs = top(scores / temperature, options.k)
        if vocab.shape[1] < raw.shape[1]:
            log_probs = log_probs + np.log(np.exp(marginal).sum(-1))[:, None, None]
        if options.rows is not None:
            order = np.argsort(-weights, axis=None, kind="stable")
            previous.flat[order[options.rows :]] = -1
        children = self.model.token_ids[np.take_along_axis(vocab[:, None], best, -1)]
        confidences = self.scores.confidence(hidden, before)
        return TransitionTable.from_candidates(previous, children, log_probs, confidences)

    def log_probs(self, block: Block, previous: Ints) -> Array:
        logits = self.model.logits(block.hidden)
        vocab = self._support(logits, None)
        scores = self.scores.score(block.hidden, logits, previous[:, None], vocab)
        scores = log_softmax(scores[:, 0])
        if vocab.shape[1] < logits.shape[1]:
            marginal = np.take_along_axis(log_softmax(logits), vocab, -1)
            scores = scores + np.log(np.exp(marginal).sum(-1, keepdims=True))
        wide = np.full(logits.shape, -np.inf, np.float32)
        np.put_along_axis(wide, vocab, scores, -1)
        return self.model.over_target_vocabulary(wide)

    def _support(self, marginal: Array, shortlist: int | None) -> Ints:
        """Return each depth's (D, v) scored tokens of the drafter's vocabulary, ascending."""
        if self.scores.candidates is not None:
            best = np.argsort(-marginal, axis=-1, kind="stable")[:, : self.scores.candidates]
        else:
            best = np.argsort(-marginal.max(0), kind="stable")[:shortlist]
            best = np.tile(best, (len(marginal), 1))
        return np.sort(best, -1).astype(np.int32)


class RecurrentHead(OneByOneHead):
    """`treeflash.decoding.interfaces.ARHead` in NumPy, depth by depth over the paths it keeps."""

    def __init__(self, model: DrafterModel, cell: Cell) -> None:
        self.model, self.cell = model, cell

    def transitions_one(self, block: Block, options: TableOptions) -> TransitionTable:
        logits = self.model.logits(block.hidden)
        if options.noise is not None:
            logits = logits + options.noise.values(self.model.token_ids)
        temperature = np.float32(options.temperature)
        marginal = log_softmax(logits / temperature)
        vocab = np.sort(np.argsort(-marginal.max(0), kind="stable")[: options.shortlist])
        mass = np.zeros(len(logits), np.float32)
        if len(vocab) < logits.shape[1]:
            mass = np.log(np.exp(marginal[:, vocab]).sum(-1))
        width = options.m if options.rows is None else min(options.m, options.rows)
        state, paths = self._start(), np.zeros(1)
        previous = np.array([block.root], np.int32)
        tokens, log_probs, kept, confidences = [], [], [], []
        for depth, hidden in enumerate(block.hidden, 1):
            state, scores = self._step(state, hidden, previous, depth)
            scores = (logits[depth - 1] + scores)[:, vocab] / temperature
            best, log_probs_ = top(scores, options.k)
            tokens.append(self.model.token_ids[vocab[best]])
            log_probs.append(log_probs_ + mass[depth - 1])
            confidence = self.cell.confidence(hidden[None], previous[None])
            if confidence is not None:
                confidences.append(confidence[0])
            chosen, paths = best_children(paths, log_probs[-1], width)
            kept.append(chosen)
            previous, state = tokens[-1].ravel()[chosen], state[chosen // best.shape[1]]
        return TransitionTable.from_paths(tokens, log_probs, kept, confidences or None)

    def log_probs(self, block: Block, previous: Ints) -> Array:
        logits, state = self.model.logits(block.hidden), self._start()
        rows = []
        for depth, (hidden, token) in enumerate(zip(block.hidden, previous, strict=True), 1):
            state, scores = self._step(state, hidden, np.array([token]), depth)
            rows.append(logits[depth - 1] + scores[0])
        return self.model.over_target_vocabulary(log_softmax(np.stack(rows)))

    def _start(self) -> Array:
        """Return the (1, state_size) state before the root."""
        return np.zeros((1, self.model.config.head_state_size), np.float32)

    def _step(self, state: Array, hidden: Array, previous: Ints, depth: int) -> tuple[Array, Array]:
        """Compute n paths' states, and the (n, Vd) biases on the marginal logits after them."""
        normed = self.model.normed("norm", hidden)
        state, queries = self.cell.step(state, normed, previous, depth)
        return state, queries @ self.cell.keys.T


TABLE_HEADS: dict[str, Callable[[DrafterModel, Any], ARHead | RecurrentHead]] = {
    "conditional": ARHead,
    "recurrent": RecurrentHead,
}
"""What computes the tables of a head, by the kind that its format has."""
