"""Conditional heads that depend on all tokens of a path: DSpark's `rnn`, and Domino."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from treeflash.decoding.gumbel import Noise
from treeflash.decoding.transitions import TransitionTable
from treeflash_mlx.drafter import Block, drafted
from treeflash_mlx.drafter_model import DrafterModel
from treeflash_mlx.head_weights import DominoWeights
from treeflash_mlx.output_stage import OutputStage
from treeflash_mlx.scores import Markov
from treeflash_mlx.target import Target
from treeflash_mlx.topk import log_softmax, logsumexp, top_indices, top_log_probs


class Cell(Protocol):
    """A recurrent head: a state for each path, and a bias on the logits of its children."""

    keys: Any
    """An embedding with a row of r for each of the drafter's tokens: the products of the rows with
    a query are the bias."""

    def step(
        self, state: mx.array, normed: mx.array, previous: mx.array, depth: int
    ) -> tuple[mx.array, mx.array]:
        """Advance n paths by their last token.

        Args:
            state: (n, state_size) of the paths without it; 0 before the root.
            normed: (1, hidden_size) the normalised output at this depth.
            previous: (n,) tokens of the target's vocabulary.
            depth: of the children, from 1.

        Returns:
            (n, state_size) states, and (n, r) queries.
        """

    def confidence(self, normed: mx.array, previous: mx.array, rows: mx.array) -> mx.array | None:
        """See `Scores.confidence`."""


class MarkovRNN:
    """DSpark: z(b) + <W2[b], tanh(o)>, a gated recurrent unit over W1[a] and the hidden state."""

    def __init__(self, weights: Any, model: DrafterModel) -> None:
        """Take the weights."""
        self.weights = weights
        self.keys = weights.markov_w2
        self.confidence = Markov(weights, model.config).confidence

    def step(
        self, state: mx.array, normed: mx.array, previous: mx.array, depth: int
    ) -> tuple[mx.array, mx.array]:
        """See `Cell.step`."""
        rows = self.weights.markov_w1(previous)
        same = mx.broadcast_to(normed, (len(rows), normed.shape[1]))
        x = self.weights.joint_proj(mx.concatenate([state, rows, same], -1))
        gate, candidate, out = mx.split(x, 3, -1)
        gate = mx.sigmoid(gate)
        return gate * state + (1 - gate) * mx.tanh(candidate), mx.tanh(out)


class Domino:
    """Domino: z(b) + <W2[b], silu(W1 [u; s])>, where s is a GRU over the tokens' embeddings."""

    def __init__(self, weights: Any, model: DrafterModel, output: OutputStage) -> None:
        """Take the weights."""
        self.weights = weights
        self.output = output
        self.projection, _, self.keys = weights.embed_proj
        self.rank = model.config.head_rank
        self.first = model.config.head_from_depth

    def step(
        self, state: mx.array, normed: mx.array, previous: mx.array, depth: int
    ) -> tuple[mx.array, mx.array]:
        """See `Cell.step`; before its first depth the bias is 0."""
        gru = self.weights.prefix_gru
        of_input = mx.split(self.output.embed(previous) @ gru.weight_ih_l0.T, 3, -1)
        of_state = mx.split(state @ gru.weight_hh_l0.T, 3, -1)
        reset, update = (mx.sigmoid(of_input[i] + of_state[i]) for i in (0, 1))
        new = mx.tanh(of_input[2] + reset * of_state[2])
        state = (1 - update) * new + update * state
        if depth < self.first:
            return state, mx.zeros((len(state), self.rank), state.dtype)
        same = mx.broadcast_to(normed, (len(state), normed.shape[1]))
        return state, nn.silu(self.projection(mx.concatenate([same, state], -1)))

    def confidence(self, normed: mx.array, previous: mx.array, rows: mx.array) -> mx.array | None:
        """See `Scores.confidence`."""
        return None


class RecurrentHead:
    """`treeflash.decoding.interfaces.ARHead` in MLX, depth by depth over the paths it keeps."""

    def __init__(self, module: nn.Module, model: DrafterModel, target: Target) -> None:
        """Use the weights of a head with those of its drafter and target."""
        self.module = module
        self.model = model
        self.output = OutputStage(model.config, model.own, target)
        self.cell: Cell = (
            Domino(module, model, self.output)
            if isinstance(module, DominoWeights)
            else MarkovRNN(module, model)
        )

    def transitions(
        self,
        blocks: Sequence[Block],
        m: int,
        k: int,
        temperature: float,
        *,
        noise: Noise | None = None,
        shortlist: int | None = None,
        rows: int | None = None,
    ) -> list[TransitionTable]:
        """See `ARHead.transitions`; text by text."""
        normed = self.model.norm(drafted(blocks))
        logits = self.output.logits(normed)
        if noise is not None:
            logits = logits + self.output.noise(noise)
        parts = zip(
            blocks, mx.split(normed, len(blocks)), mx.split(logits, len(blocks)), strict=True
        )
        width = m if rows is None else min(m, rows)
        return [
            self._table(block.root, *x, width, k, temperature, shortlist) for block, *x in parts
        ]

    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `ARHead.log_probs`."""
        normed = self.model.norm(block.hidden)
        logits, state, tokens = self.output.logits(normed), self._start(normed), mx.array(previous)
        rows = []
        for d in range(len(normed)):
            one = slice(d, d + 1)
            state, queries = self.cell.step(state, normed[one], tokens[one], d + 1)
            bias = self.cell.keys.as_linear(queries)
            rows.append(logits[one].astype(mx.float32) + bias.astype(mx.float32))
        log_probs = log_softmax(mx.concatenate(rows))
        return np.array(self.output.over_target_vocabulary(log_probs))

    def _table(
        self,
        root: int,
        normed: mx.array,
        logits: mx.array,
        width: int,
        k: int,
        temperature: float,
        shortlist: int | None,
    ) -> TransitionTable:
        """The table of a text, of which at most `width` paths are expanded at each depth."""
        logits, keys, vocab, mass = logits.astype(mx.float32), None, None, None
        if shortlist is not None and shortlist < logits.shape[1]:
            marginal = log_softmax(logits / temperature)
            vocab = mx.sort(top_indices(marginal.max(0, keepdims=True), shortlist)[0])
            mass = logsumexp(marginal[:, vocab])
            keys, logits = self.cell.keys(vocab), logits[:, vocab]
        k = min(k, logits.shape[1])
        state, previous = self._start(normed), mx.array([root], mx.int32)
        paths = mx.zeros(1)
        parts, sizes = [], []
        for d in range(len(normed)):
            one = normed[d : d + 1]
            state, queries = self.cell.step(state, one, previous, d + 1)
            bias = self.cell.keys.as_linear(queries) if keys is None else queries @ keys.T
            tokens, log_probs = top_log_probs(logits[d] + bias.astype(mx.float32), k, temperature)
            if vocab is not None and mass is not None:
                tokens, log_probs = vocab[tokens], log_probs + mass[d]
            tokens = self.output.to_target(tokens)
            of_children = (paths[:, None] + log_probs).reshape(-1)
            # The first row is the chain's, which must not end here.
            ranks = mx.concatenate([mx.array([mx.inf]), of_children[1:]])
            kept = mx.argsort(-ranks)[:width]
            found = [tokens.reshape(-1), log_probs.reshape(-1), kept]
            confidence = self.cell.confidence(one, previous, mx.zeros_like(previous))
            if confidence is not None:
                found.append(confidence)
            # Token ids are exact in float32, and one array needs one read from the device.
            parts += [part.astype(mx.float32) for part in found]
            sizes.append([part.shape[0] for part in found])
            previous, paths = tokens.reshape(-1)[kept], of_children[kept]
            state = state[kept // k]
        numbers = np.array(mx.concatenate(parts))
        each = np.split(numbers, np.cumsum(np.concatenate(sizes))[:-1])
        found_, log_probs_, kept_, *confidences = (
            each[i :: len(sizes[0])] for i in range(len(sizes[0]))
        )
        return TransitionTable.from_paths(
            [x.astype(np.int32).reshape(-1, k) for x in found_],
            [x.reshape(-1, k) for x in log_probs_],
            [x.astype(np.int64) for x in kept_],
            *confidences,
        )

    def _start(self, normed: mx.array) -> mx.array:
        """The (1, state_size) state before the root."""
        return mx.zeros((1, self.model.config.head_state_size), normed.dtype)
