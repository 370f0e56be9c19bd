"""Conditional heads that depend on all tokens of a path: DSpark's `rnn`, and Domino."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.gumbel import Noise
from treeflash.decoding.one_by_one import OneByOneHead
from treeflash.decoding.transitions import TransitionTable
from treeflash.reference.drafter import Block
from treeflash.reference.drafter_model import DrafterModel
from treeflash.reference.numerics import Array, log_softmax, sigmoid, silu, top
from treeflash.reference.scores import Markov


class Cell(Protocol):
    """A recurrent head: a state for each path, and a bias on the logits of its children."""

    keys: Array
    """(Vd, r) of the drafter's tokens: their products with a query are the bias."""

    def step(
        self, state: Array, normed: Array, previous: NDArray[np.int32], depth: int
    ) -> tuple[Array, Array]:
        """Advance n paths by their last token.

        Args:
            state: (n, state_size) of the paths without it; 0 before the root.
            normed: (hidden_size,) the normalised output at this depth.
            previous: (n,) tokens of the target's vocabulary.
            depth: of the children, from 1.

        Returns:
            (n, state_size) states, and (n, r) queries.
        """

    def confidence(self, hidden: Array, previous: NDArray[np.int32]) -> Array | None:
        """See `Scores.confidence`."""


class MarkovRNN:
    """DSpark: z(b) + <W2[b], tanh(o)>, a gated recurrent unit over W1[a] and the hidden state."""

    def __init__(self, model: DrafterModel) -> None:
        """Take the `markov_head` tensors of a drafter."""
        self.tensors = model.head_tensors
        self.keys = self.tensors["markov_w2.weight"]
        self.confidence = Markov(model).confidence

    def step(
        self, state: Array, normed: Array, previous: NDArray[np.int32], depth: int
    ) -> tuple[Array, Array]:
        """See `Cell.step`."""
        rows = self.tensors["markov_w1.weight"][previous]
        x = np.concatenate([state, rows, np.broadcast_to(normed, (len(rows), len(normed)))], -1)
        joint = x @ self.tensors["joint_proj.weight"].T + self.tensors["joint_proj.bias"]
        gate, candidate, out = np.split(joint, 3, -1)
        gate = sigmoid(gate)
        return gate * state + (1 - gate) * np.tanh(candidate), np.tanh(out)


class Domino:
    """Domino: z(b) + <W2[b], silu(W1 [u; s])>, where s is a GRU over the tokens' embeddings."""

    def __init__(self, model: DrafterModel) -> None:
        """Take the `prefix_gru` and `embed_proj` tensors of a drafter."""
        self.model = model
        self.tensors = model.head_tensors
        self.keys = self.tensors["embed_proj.2.weight"]

    def step(
        self, state: Array, normed: Array, previous: NDArray[np.int32], depth: int
    ) -> tuple[Array, Array]:
        """See `Cell.step`; before its first depth the bias is 0."""
        embedded = self.model.embed(previous)
        of_input = np.split(embedded @ self.tensors["prefix_gru.weight_ih_l0"].T, 3, -1)
        of_state = np.split(state @ self.tensors["prefix_gru.weight_hh_l0"].T, 3, -1)
        reset, update = (sigmoid(of_input[i] + of_state[i]) for i in (0, 1))
        new = np.tanh(of_input[2] + reset * of_state[2])
        state = (1 - update) * new + update * state
        if depth < self.model.config.head_from_depth:
            return state, np.zeros((len(state), self.keys.shape[1]), np.float32)
        x = np.concatenate([np.broadcast_to(normed, embedded.shape), state], -1)
        return state, silu(x @ self.tensors["embed_proj.0.weight"].T)

    def confidence(self, hidden: Array, previous: NDArray[np.int32]) -> Array | None:
        """See `Scores.confidence`."""
        return None


CELLS: dict[str | None, type[MarkovRNN | Domino]] = {"rnn": MarkovRNN, "domino": Domino}
"""By `DrafterConfig.head`."""


class RecurrentHead(OneByOneHead):
    """`treeflash.decoding.interfaces.ARHead` in NumPy, depth by depth over the paths it keeps."""

    def __init__(self, model: DrafterModel) -> None:
        """Use the head of a drafter."""
        self.model = model
        self.cell: Cell = CELLS[model.config.head](model)

    def transitions_one(
        self,
        block: Block,
        m: int,
        k: int,
        temperature: float,
        *,
        noise: Noise | None,
        shortlist: int | None,
        rows: int | None,
    ) -> TransitionTable:
        """See `ARHead.transitions`."""
        logits = self.model.logits(block.hidden)
        if noise is not None:
            logits = logits + noise.of(self.model.token_ids)
        marginal = log_softmax(logits / np.float32(temperature))
        vocab = np.sort(np.argsort(-marginal.max(0), kind="stable")[:shortlist])
        mass = np.zeros(len(logits), np.float32)
        if len(vocab) < logits.shape[1]:
            mass = np.log(np.exp(marginal[:, vocab]).sum(-1))
        width = m if rows is None else min(m, rows)
        state, previous, paths = self._start(), np.array([block.root], np.int32), np.zeros(1)
        tokens, log_probs, kept, confidences = [], [], [], []
        for depth, hidden in enumerate(block.hidden, 1):
            state, scores = self._step(state, hidden, previous, depth)
            scores = (logits[depth - 1] + scores)[:, vocab] / np.float32(temperature)
            best, log_probs_ = top(scores, k)
            tokens.append(self.model.token_ids[vocab[best]])
            log_probs.append(log_probs_ + mass[depth - 1])
            confidence = self.cell.confidence(hidden[None], previous[None])
            if confidence is not None:
                confidences.append(confidence[0])
            of_children = (paths[:, None] + log_probs[-1]).ravel()
            ranks = of_children.copy()
            ranks[0] = np.inf  # the first row is the chain's, which must not end here
            kept.append(np.argsort(-ranks, kind="stable")[:width])
            previous, paths = tokens[-1].ravel()[kept[-1]], of_children[kept[-1]]
            state = state[kept[-1] // best.shape[1]]
        return TransitionTable.from_paths(tokens, log_probs, kept, confidences or None)

    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> Array:
        """See `ARHead.log_probs`."""
        logits, state = self.model.logits(block.hidden), self._start()
        rows = []
        for depth, (hidden, token) in enumerate(zip(block.hidden, previous, strict=True), 1):
            state, scores = self._step(state, hidden, np.array([token]), depth)
            rows.append(logits[depth - 1] + scores[0])
        return self.model.over_target_vocabulary(log_softmax(np.stack(rows)))

    def _start(self) -> Array:
        return np.zeros((1, self.model.config.head_state_size), np.float32)

    def _step(
        self, state: Array, hidden: Array, previous: NDArray[np.int32], depth: int
    ) -> tuple[Array, Array]:
        """The states of n paths, and (n, Vd) what their tokens add to the marginal logits."""
        normed = self.model.normed("norm", hidden)
        state, queries = self.cell.step(state, normed, previous, depth)
        return state, queries @ self.cell.keys.T
